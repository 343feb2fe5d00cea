"""Chat templates in the style of well-known families, and conversations to render with them."""

from __future__ import annotations

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}

FAMILIES = {
    "ChatML": """{% for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{% endif %}""",
    "ChatML with tools": """{%- if tools is not none and tools %}
{{- '<|im_start|>system\nTools: ' ~ (tools | tojson) ~ '<|im_end|>\n' }}
{%- elif documents is not none %}
{{- '<|im_start|>system\nDocuments<|im_end|>\n' }}
{%- elif messages[0].role != 'system' %}
{{- '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, multi_step=true) %}
{%- for message in messages[::-1] %}
{%- set index = (messages|length - 1) - loop.index0 %}
{%- if ns.multi_step and message.role == 'user' and not message.content.startswith('<tool>') %}
{%- set ns.multi_step = false %}
{%- set ns.last = index %}
{%- endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'assistant' and loop.index0 < ns.last and '</think>' in message.content %}
{%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
{%- else %}
{%- set content = message.content %}
{%- endif %}
{{- '<|im_start|>' ~ message.role ~ '\n' ~ content ~ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\n\n</think>\n\n' }}
{%- endif %}
{%- endif %}""",
    "Llama 2": """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}
{% set system_message = messages[0]['content'] %}
{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}
{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{% if loop.index0 == 0 and system_message != false %}
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}""",
    "Llama 3": """{% set loop_messages = messages %}{% for message in loop_messages %}
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'
 + message['content'] | trim + '<|eot_id|>' %}
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""",
    "Llama 3.2": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}""",
    "Zephyr": """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "Gemma": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}""",
    "Gemma 3": """{{ bos_token }}
{%- set first = '' -%}
{%- set turns = messages -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set given = messages[0]['content'] -%}
    {%- set first = (given if given is string else given[0]['text']) + '\n\n' -%}
    {%- set turns = messages[1:] -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("users and assistants must take turns") }}
    {%- endif -%}
    {{ '<start_of_turn>' + ('model' if turn['role'] == 'assistant' else turn['role']) + '\n'
       + (first if loop.first else "") }}
    {%- if turn['content'] is string -%}
        {{ turn['content'] | trim }}
    {%- elif turn['content'] is iterable -%}
        {%- for part in turn['content'] -%}
            {{ '<start_of_image>' if part['type'] == 'image' else part['text'] | trim }}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("unknown content") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\n' }}
{%- endif -%}""",
    "Qwen 2.5": """{%- if tools %}
    {{- '<|im_start|>system\n' + (messages[0].content if messages[0].role == 'system' else 'Help.') }}
    {%- for tool in tools %}
        {{- "\n" + (tool | tojson) }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nHelp.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == "user" or (m.role == "system" and not loop.first)
        or (m.role == "assistant" and not m.tool_calls) %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}
    {%- elif m.role == "tool" %}
        {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != "tool" %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n' + m.content + ('' if not loop.last and messages[loop.index0 + 1].role == "tool" else '<|im_end|>\n') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}""",
    "Qwen 3": """{%- if not tools and messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set seen = namespace(tool=true, last=messages|length - 1) %}
{%- for m in messages[::-1] %}
    {%- set at = (messages|length - 1) - loop.index0 %}
    {%- if seen.tool and m.role == "user" and m.content is string
        and not (m.content.startswith('<reply>') and m.content.endswith('</reply>')) %}
        {%- set seen.tool = false %}
        {%- set seen.last = at %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set text = m.content if m.content is string else '' %}
    {%- if m.role == "user" or (m.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\n' + text + '<|im_end|>' + '\n' }}
    {%- elif m.role == "assistant" %}
        {%- set thought = '' %}
        {%- if m.reasoning_content is string %}
            {%- set thought = m.reasoning_content %}
        {%- elif '</think>' in text %}
            {%- set thought = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set text = text.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > seen.last and (loop.last or (not loop.last and thought)) %}
            {{- '<|im_start|>' + m.role + '\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + text.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>' + m.role + '\n' + text }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}""",
    "Mistral": """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" ~ tools ~ "][/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported.") }}
    {%- endif %}
{%- endfor %}""",
    "Phi": """{% for message in messages %}{% if message['role'] in ['system', 'user', 'assistant'] %}
{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>' + '\n'}}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}""",
    "loop controls": """{% for message in messages %}{% if message.role == 'system' %}{% continue %}{% endif %}
{{ loop.index }}/{{ loop.length }} {{ message.role }}: {{ message.content }}
{% if loop.index == 20 %}{% break %}{% endif %}{% endfor %}answer:""",
    "JSON": """{{ messages | tojson }}
{{ messages[-1] | tojson(indent=2, sort_keys=true) }}
{{ {'<a>': "it's & é", 'n': 1.5, 'none': none, 'yes': true} | tojson(separators=(',', ':')) }}
{{ 'é' | tojson(ensure_ascii=true) }}""",
    "macros": """{% macro turn(role, text='', end='<|end|>') %}<|{{ role }}|>
{{ text | trim }}{{ caller() if caller else '' }}{{ end }}
{% endmacro %}
{{ bos_token }}{% for m in messages %}{{ turn(m.role, text=m.content) }}{% endfor %}
{% call turn('note', end='.') %}{{ 'now ' ~ strftime_now('%Y') }}{% endcall %}
{{ '<|assistant|>' if add_generation_prompt }}""",
    "generation tag": """{% for m in messages %}{% if m.role == 'assistant' %}
<|assistant|>{% generation %}{{ m.content }}{{ eos_token }}
{% endgeneration %}{% else %}<|{{ m.role }}|>{{ m.content }}
{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}""",
    "filters": """{% set ns = namespace(rows=[], width=8) %}{% for m in messages %}
{% set ns.rows = ns.rows + [m.role ~ ':' ~ m.content] %}{% endfor %}
{{ '=' * 12 }}{{ [1, 2] * 2 }}{{ 2 ** 5 }}{{ 7 // 2 }}{{ '%03d|%s' % (7, 'x') }}{{ '{:>4}'.format('ab') }}
{{ ns.rows | join('\n') | indent(2, first=true) }}|{{ 'role' | center(ns.width) }}|{{ 'a b' | wordwrap(1) }}
{{ dict(a=1, b=2) | dictsort }}{{ dict.fromkeys(['k'], 0) }}{{ messages | map(attribute='role') | unique | list }}
{{ 'x' | replace('x', 'yy') }}{{ undefined_name }}{{ missing is defined }}{{ documents is none }}
{{ '<b>' | e }}{{ '%s and %s' | format('a', 'b') }}{{ [3, 1] | sort | pprint }}{{ {'k': 'v'} | xmlattr }}""",
}

_TEXTS = [
    "Is it raining?",
    "  Two spaces, and a line\n\nbelow  \n",
    "naïve café 你好 🙂 \t tab",
    "```python\nprint('{{ x }}')\n```\n{% if %} <b>&amp;</b> \"quoted\" \\n",
    "1234567 don't I'LL x=y+z;",
]
CONVERSATIONS: list[list[dict[str, str]]] = []
for _text in _TEXTS:
    _user = {"role": "user", "content": _text}
    _past = [_user, {"role": "assistant", "content": "<think>\nhm\n</think>\n\n Yes. "}]
    _again = {"role": "user", "content": "And " + _text}
    _system = {"role": "system", "content": "Be brief.\n"}
    CONVERSATIONS += [[_user], [_system, _user], [*_past, _again], [_system, *_past, _again]]
    CONVERSATIONS += [[*_past, _user, *_past[1:], _again], [_again]]
CONVERSATIONS += [[_user, _again], [_past[1], _user], [_system, _user, _again], [_user, _system, _again]]
"""The last four take no turns, which some templates refuse."""
