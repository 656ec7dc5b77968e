"""The GPUs that kernels are compiled for and measured against: what XLA asks of a card, and its two peak rates.

From NVIDIA's data sheets (H100 SXM, H200 SXM, B200 SXM) and the attributes that the CUDA driver reports for them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One card.

    flops: dense bfloat16 or float16 matmuls, FLOP/s. bandwidth: device memory, bytes/s. clock: Hz, the highest.
    """

    name: str
    device_kind: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    clock: float
    memory: int
    l2: int
    bandwidth: float
    flops: float

    @property
    def target_config(self) -> str:
        """XLA's GpuTargetConfigProto as text: enough to compile for a card that is not there."""
        major, minor = self.compute_capability
        return f"""
            platform_name: "CUDA"
            device_description_str: "{self.device_kind}"
            dnn_version_info {{ major: 9 minor: 10 }}
            gpu_device_info {{
              cuda_compute_capability {{ major: {major} minor: {minor} }}
              core_count: {self.multiprocessors}
              clock_rate_ghz: {self.clock / 1e9}
              device_memory_size: {self.memory}
              memory_bandwidth: {int(self.bandwidth)}
              l2_cache_size: {self.l2}
              threads_per_warp: 32
              threads_per_block_limit: 1024
              threads_per_core_limit: 2048
              fpus_per_core: 128
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              shared_memory_per_core: 233472
              shared_memory_per_block: 49152
              shared_memory_per_block_optin: 232448
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
            }}"""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", "NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98e9, 85 * 10**9, 50 * 2**20, 3.35e12, 989e12),
        Gpu("h200", "NVIDIA H200", (9, 0), 132, 1.98e9, 150 * 10**9, 50 * 2**20, 4.8e12, 989e12),
        Gpu("b200", "NVIDIA B200", (10, 0), 148, 1.965e9, 190 * 10**9, 126 * 2**20, 8e12, 2250e12),
    )
}
