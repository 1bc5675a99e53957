"""From messages to prompts: Hugging Face's template conventions, the sandbox, and models without a template."""

from __future__ import annotations

from datetime import datetime

import pytest

from persona_edge.errors import InputError, ModelFileError
from persona_edge.runtime.chat_template import ChatTemplate
from persona_edge.runtime.values import Message

QUESTION: list[Message] = [{"role": "user", "content": "Hi <there>"}]


def render(source: str | None, messages: list[Message] = QUESTION) -> str:
    return ChatTemplate(source, "<s>", "</s>").render(messages).text


def test_the_conventions_of_hugging_face() -> None:
    source = """
{%- for message in messages %}
    {{- bos_token }}[{{ message.role }}] {{ message['content'] | trim }}{{ eos_token }}
    {% if loop.first %}
!{% endif %}
{%- endfor %}
{% if add_generation_prompt and not tools %}
>
{%- endif %}"""
    assert render(source) == "<s>[user] Hi <there></s>\n!>"


def test_helpers() -> None:
    assert render("{{ strftime_now('%Y') }}") in {str(datetime.now().year), str(datetime.now().year - 1)}
    assert render("{{ {'b': 'é', 'a': 1} | tojson }}") == '{"b": "é", "a": 1}'
    assert render("{% for n in range(9) %}{% if n == 2 %}{% break %}{% endif %}{{ n }}{% endfor %}") == "01"


def test_a_template_may_refuse_messages() -> None:
    with pytest.raises(InputError, match="does not accept these messages: roles must alternate"):
        render("{{ raise_exception('roles must\nalternate') }}")


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('true') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content + 'x' }}",
    ],
)
def test_a_template_can_do_nothing_but_render(attack: str) -> None:
    with pytest.raises(InputError, match="chat template does not accept") as caught:
        render(attack)
    assert "\n" not in str(caught.value)


def test_a_template_that_is_no_template() -> None:
    with pytest.raises(ModelFileError, match="chat template is not valid"):
        ChatTemplate("{% for message in %}")


def test_a_model_without_a_template_gets_a_transcript() -> None:
    conversation: list[Message] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": " Hello.\n"},
        {"role": "user", "content": "Bye"},
    ]
    prompt = ChatTemplate(None).render(conversation)
    assert prompt.text == "Be brief.\n\nUser: Hi\nAssistant: Hello.\nUser: Bye\nAssistant:"
    assert prompt.stop == ("\nUser:",)


@pytest.mark.parametrize("messages", [[], [{"role": "user"}], [{"role": "user", "content": None}], ["Hi"]])
def test_malformed_messages(messages: list[Message]) -> None:
    with pytest.raises(InputError, match="message"):
        ChatTemplate(None).render(messages)
