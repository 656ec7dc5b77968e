"""Bytes and time of attention, from the tiles that its kernels visit, beside the FlashAttention paper's figures.

    python benchmarks/io_model.py [--plot FILE.png] [--json FILE]

No device is needed: this counts, it does not measure. Bytes are those between a GPU's memory and its chip; time is the
least that they and the matmuls allow, on the paper's A100 or on an H100. The paper's figures (arXiv 2205.14135: figure
2 and appendix E) are its measurements.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pallas_kernels import BlockMask
from pallas_kernels.io_model import A100, H100, Loop, Problem, kernel_loops, paper_loops, standard_bytes, total_bytes

COLUMNS = (64, 128, 256, 384, 512)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16_384)
STRIDES = (1, 2, 4, 8, 16, 32)
# GPT-2 medium's attention of figure 2: GB and ms, forward and backward.
FIGURE_2 = Problem(T=1024, S=1024, H=64, N=16, K=16, batch=64)
MEASURED_GB, MEASURED_MS = {"standard": 40.3, "flash": 4.4}, {"standard": 41.7, "flash": 7.3}
# Forward and backward of batch 16, 8 heads of 64, with dropout and padding, in ms.
APPENDIX_E = {
    "standard": {512: 2.35, 1024: 8.29, 2048: 31.75, 4096: 124.2},
    "flash": {512: 0.95, 1024: 2.55, 2048: 9.56, 4096: 37.5},
    "block-sparse": {512: 0.45, 1024: 0.89, 2048: 1.95, 4096: 4.12},
}


@dataclass(frozen=True)
class Point:
    """Forward and backward of one way to compute attention."""

    series: str
    x: float  # length, columns of a tile, or fraction of blocks kept
    gigabytes: float
    milliseconds: float


def flash(series: str, x: float, loops: list[Loop], problem: Problem, machine=A100) -> Point:
    moved = total_bytes(loops, problem)
    operations = sum(loop.operations(problem) for loop in loops)
    return Point(series, x, moved / 1e9, machine.seconds(moved, operations) * 1e3)


def standard(x: float, problem: Problem) -> Point:
    moved = standard_bytes(problem, masks_and_drops=True)
    operations = 6 * 2 * problem.batch * problem.N * problem.T * problem.S * problem.H
    return Point("standard", x, moved / 1e9, A100.seconds(moved, operations) * 1e3)


def by_tile() -> list[Point]:
    return [flash("algorithms 1 and 4", columns, paper_loops(columns), FIGURE_2) for columns in COLUMNS]


def by_length() -> list[Point]:
    points = []
    for length in LENGTHS:
        problem = Problem(T=length, S=length, H=64, N=8, K=8, batch=16)
        sparse = replace(problem, block_mask=BlockMask.butterfly(length, length))
        points += [
            standard(length, problem),
            flash("flash, 256 columns", length, paper_loops(256), problem),
            flash("block-sparse, 128 columns", length, paper_loops(128, rows=128), sparse),
            flash("Hopper kernels, H100", length, kernel_loops(problem), problem, H100),
            flash("Hopper kernels block-sparse, H100", length, kernel_loops(sparse), sparse, H100),
        ]
    return points


def by_sparsity() -> list[Point]:
    points = []
    for stride in STRIDES:
        mask = BlockMask.strided(4096, 4096, stride=stride)
        problem = Problem(T=4096, S=4096, H=64, N=8, K=8, batch=16, block_mask=mask)
        for series, loops, machine in (
            ("block-sparse, 128 columns", paper_loops(128, rows=128), A100),
            ("Hopper kernels, H100", kernel_loops(problem), H100),
        ):
            points.append(flash(series, float(mask.density), loops, problem, machine))
    return points


SWEEPS: dict[str, Callable[[], list[Point]]] = {
    "length (batch 16, 8 heads of 64)": by_length,
    "columns of a tile (figure 2's problem)": by_tile,
    "fraction of blocks kept (length 4096, strided)": by_sparsity,
}


def show(console: Console, sweeps: dict[str, list[Point]]) -> None:
    table = Table("figure 2: forward and backward", "GB, counted", "GB, the paper", "ms, the paper")
    for name, counted in {
        "standard": f"{standard_bytes(FIGURE_2, masks_and_drops=True) / 1e9:.1f}",
        "flash": " to ".join(f"{total_bytes(paper_loops(columns), FIGURE_2) / 1e9:.2f}" for columns in (384, 256)),
    }.items():
        table.add_row(name, counted, str(MEASURED_GB[name]), str(MEASURED_MS[name]))
    console.print(table)
    for title, points in sweeps.items():
        table = Table("by " + title, "", "GB", "ms, at least", "ms, the paper")
        for point in points:
            measured = APPENDIX_E.get(point.series.split(",")[0], {}).get(int(point.x), "") if "length" in title else ""
            table.add_row(
                f"{point.x:g}", point.series, f"{point.gigabytes:.2f}", f"{point.milliseconds:.2f}", str(measured)
            )
        console.print(table)


def plot(path: Path, sweeps: dict[str, list[Point]]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(sweeps), figsize=(5 * len(sweeps), 8), squeeze=False)
    for column, (title, points) in enumerate(sweeps.items()):
        for row, quantity in enumerate(("gigabytes", "milliseconds")):
            axis = axes[row, column]
            for series in dict.fromkeys(point.series for point in points):
                mine = [point for point in points if point.series == series]
                axis.plot([p.x for p in mine], [getattr(p, quantity) for p in mine], marker="o", label=series)
            axis.set(xscale="log", yscale="log", xlabel=title, ylabel=quantity)
    for name, figures in APPENDIX_E.items():
        axes[1, 0].plot(list(figures), list(figures.values()), linestyle="none", marker="x", label=f"{name}, the paper")
    axes[0, 1].axhline(MEASURED_GB["flash"], linestyle=":", color="black", label="the paper")
    for axis in axes.flat:
        axis.legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="draw the curves there; needs matplotlib")
    parser.add_argument("--json", type=Path, help="write all points there")
    arguments = parser.parse_args()
    sweeps = {title: sweep() for title, sweep in SWEEPS.items()}
    show(Console(width=110), sweeps)
    if arguments.plot:
        plot(arguments.plot, sweeps)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({t: [asdict(p) for p in points] for t, points in sweeps.items()}, indent=1)
        )


if __name__ == "__main__":
    main()
