from datetime import datetime
from typing import Any

import pytest

from models.chat_template import render_chat

USER = [{"role": "user", "content": "Hi"}]
# As most models have it: a block tag's own line leaves no trace, and one may break out of a loop.
CHATML = """\
{%- for message in messages %}
    {%- if message.role == "system" and not loop.first %}
        {{- raise_exception("a system message must come first") }}
    {%- endif %}
{{ bos_token }}<|im_start|>{{ message['role'] }}
{{ message.content | trim }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""


def test_messages_in_order_and_the_generation_prompt() -> None:
    messages = [{"role": "system", "content": " Be brief. "}, *USER]
    text = "<s><|im_start|>system\nBe brief.<|im_end|>\n<s><|im_start|>user\nHi<|im_end|>\n"
    assert render_chat(CHATML, messages, add_generation_prompt=False, bos_token="<s>") == text
    prompted = render_chat(CHATML, messages, add_generation_prompt=True, bos_token="<s>")
    assert prompted == text + "<|im_start|>assistant\n"


def test_content_is_text_and_never_template() -> None:
    messages = [{"role": "user", "content": "{{ 7 * 7 }} <b> & {% for %}"}]
    template = "{{ messages[0].content }}"
    assert render_chat(template, messages, add_generation_prompt=False) == messages[0]["content"]


def test_what_templates_expect_beside_messages() -> None:
    template = "{{ {'a': '<é>'} | tojson }} {{ [1] | tojson(indent=2) }} {{ strftime_now('%Y') }}"
    before = datetime.now().year
    rendered = render_chat(template, USER, add_generation_prompt=False)
    assert rendered in {f'{{"a": "<é>"}} [\n  1\n] {year}' for year in (before, datetime.now().year)}
    template = "{% for m in messages %}{{ m.role }}{% break %}{% endfor %}"
    assert render_chat(template, USER * 2, add_generation_prompt=False) == "user"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['os'] }}",
        "{{ messages.append.__self__.__class__.__base__ }}{{ (1).__class__.__init__ }}",
        "{{ messages.append({'role': 'user'}) }}",
        "{{ messages[0].update({'role': 'root'}) }}",
        "{{ range(10 ** 9) | list }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_template_stays_in_its_sandbox(template: str) -> None:
    messages = [dict(USER[0])]
    with pytest.raises(ValueError, match=r"^chat template: "):
        render_chat(template, messages, add_generation_prompt=False)
    assert messages == USER


@pytest.mark.parametrize("template", ["{{ raise_exception.__globals__ }}", "{{ '{0.__class__}'.format(1) }}"])
def test_what_is_private_is_nothing(template: str) -> None:
    assert render_chat(template, USER, add_generation_prompt=False) == ""


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "^chat template: line 1: "),
        ("{{ raise_exception('roles must alternate') }}", "^chat template: roles must alternate$"),
        ("{{ messages[0].content + 1 }}", "^chat template: "),
        ("{{ messages[7].content.x }}", "^chat template: "),
    ],
)
def test_a_template_that_fails(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render_chat(template, USER, add_generation_prompt=False)


@pytest.mark.usefixtures("no_annotation_checks")
@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        ("Hi", TypeError, "messages: expected a list of dicts, got str"),
        (USER[0], TypeError, "messages: expected a list of dicts, got dict"),
        ([], ValueError, "messages: expected at least one"),
        (["Hi"], TypeError, r"messages\[0\]: expected a dict, got str"),
        ([*USER, {"role": "user"}], ValueError, r"messages\[1\]: expected the keys role and content, got \['role'\]"),
        ([{"role": "user", "content": None}], TypeError, r"messages\[0\]\['content'\]: expected str, got NoneType"),
    ],
)
def test_messages_of_another_form(messages: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        render_chat("", messages, add_generation_prompt=False)
