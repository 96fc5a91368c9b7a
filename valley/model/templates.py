"""Prompt templates, as data: what stands around a system message, a question and an answer.

One skeleton reads that data twice: `valley.model.conversation.render` builds segments from it, and `Template.jinja`
writes it as a Hugging Face chat template. A new template is one entry of `TEMPLATES`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from valley.errors import ModelError

SYSTEM = "You are Valley, an intelligent assistant that understands videos and images and answers questions about them."
"""The system message unless a setting or a message says otherwise."""

_SKELETON = r"""
{%- macro escape(text) -%}
    {%- set ns = namespace(text=text | trim) -%}
    {%- if template.line_mark -%}
        {%- if ns.text.startswith(template.line_mark) -%}{%- set ns.text = "\\" + ns.text -%}{%- endif -%}
        {%- for newline in ["\n", "\r"] -%}
            {%- set ns.text = ns.text.replace(newline + template.line_mark, newline + "\\" + template.line_mark) -%}
        {%- endfor -%}
    {%- endif -%}
    {{- ns.text -}}
{%- endmacro -%}
{%- macro plain(content) -%}
    {%- if content is string -%}{{- content -}}{%- else -%}
        {%- for part in content -%}
            {%- if part.type != "text" -%}{{- raise_exception("only a user message holds media") -}}{%- endif -%}
            {{- part.text -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- macro question(content) -%}
    {%- set ns = namespace(text="", runs=[]) -%}
    {%- for part in ([{"type": "text", "text": content}] if content is string else content) -%}
        {%- if part.type == "text" -%}
            {%- set ns.text = ns.text + part.text -%}
        {%- elif part.type in ["video", "image"] -%}
            {%- set ns.runs = ns.runs + [escape(ns.text), "<" + part.type + ">"] -%}
            {%- set ns.text = "" -%}
        {%- else -%}
            {{- raise_exception("a part is text, video or image") -}}
        {%- endif -%}
    {%- endfor -%}
    {{- (ns.runs + [escape(ns.text)]) | select | join("\n") -}}
{%- endmacro -%}
{%- set given = messages and messages[0].role == "system" -%}
{%- set system = escape(plain(messages[0].content) if given else template.system) -%}
{{- template.bos -}}
{{- template.before_system + system + template.after_system if system else template.start -}}
{%- for message in (messages[1:] if given else messages) -%}
    {%- if message.role == "user" -%}
        {%- set text = question(message.content) -%}
        {{- template.before_user + (template.glue + text if text else "") + template.after_user -}}
    {%- elif message.role == "assistant" -%}
        {%- set text = plain(message.content) | trim -%}
        {{- template.before_answer -}}
        {%- generation -%}
            {{- template.glue + text if text -}}
            {{- template.end -}}
            {{- eos_token if template.ends_with_eos -}}
        {%- endgeneration -%}
        {{- template.after_answer -}}
    {%- else -%}
        {{- raise_exception("a message is user or assistant, or system where it is the first") -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- template.before_answer -}}{%- endif -%}
"""
"""The chat template but for its strings. `valley.model.conversation.render` says the same in Python."""


@dataclass(frozen=True)
class Template:
    """The fixed strings of a prompt. None of them comes from a user.

    Attributes:
        start: beginning of a prompt that has no system message.
        before_system: opens the system message.
        after_system: closes it.
        before_user: opens a question.
        after_user: closes it.
        before_answer: opens an answer; a prompt for generation ends with it.
        glue: stands between such an opening and the first word. In front of a word it is tokenised with the word, since
            no backbone has seen `Assistant: ` with a lone space behind it; so it is supervised with the answer.
        end: ends an answer, supervised.
        ends_with_eos: the tokenizer's EOS follows `end`, supervised too.
        after_answer: stands between an answer's end and the next turn; not supervised.
        line_mark: a line of a user or system text that begins with this gets a backslash in front of it.
        control_tokens: special tokens that the tokenizer must have.
    """

    start: str
    before_system: str
    after_system: str
    before_user: str
    after_user: str
    before_answer: str
    end: str
    glue: str = ""
    ends_with_eos: bool = False
    after_answer: str = ""
    line_mark: str = ""
    control_tokens: tuple[str, ...] = ()

    def jinja(self, *, bos: str, system: str) -> str:
        """Returns the Hugging Face chat template, with generation marks, that renders what `render` renders.

        Args:
            bos: what every prompt begins with; empty where the tokenizer adds nothing.
            system: the system message of a conversation that brings none.
        """
        strings = asdict(self) | {"bos": bos, "system": system}
        return f"{{%- set template = {json.dumps(strings)} -%}}{_SKELETON}"

    def escape(self, text: str) -> str:
        """Strips `text` and puts a backslash before each of its lines that begins with `line_mark`."""
        text = text.strip()
        if not self.line_mark:
            return text
        if text.startswith(self.line_mark):
            text = f"\\{text}"
        for newline in ("\n", "\r"):
            text = text.replace(f"{newline}{self.line_mark}", f"{newline}\\{self.line_mark}")
        return text


TEMPLATES: dict[str, Template] = {
    # The paper's prompt (section 4.3). Its ### stands between two turns; here it closes the one before, so that the
    # model learns to write it, and EOS after it, where its answer ends.
    "valley": Template(
        start="###",
        before_system="",
        after_system="\n\n###",
        before_user=" Human:",
        after_user="\n###",
        before_answer=" Assistant:",
        glue=" ",
        end="\n###",
        ends_with_eos=True,
        line_mark="###",
    ),
    "chatml": Template(
        start="",
        before_system="<|im_start|>system\n",
        after_system="<|im_end|>\n",
        before_user="<|im_start|>user\n",
        after_user="<|im_end|>\n",
        before_answer="<|im_start|>assistant\n",
        end="<|im_end|>",
        after_answer="\n",
        control_tokens=("<|im_start|>", "<|im_end|>"),
    ),
    "llama3": Template(
        start="",
        before_system="<|start_header_id|>system<|end_header_id|>\n\n",
        after_system="<|eot_id|>",
        before_user="<|start_header_id|>user<|end_header_id|>\n\n",
        after_user="<|eot_id|>",
        before_answer="<|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
        control_tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
}


def find_template(name: str) -> Template:
    """Returns the template of that name.

    Raises:
        ModelError: there is none; the message lists those there are.
    """
    if name not in TEMPLATES:
        raise ModelError(f"model.template: no template is called {name!r}; known: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
