# ruff: noqa: E501
"""Chat templates in the styles that published models use, written for these tests: those that write no tool calls."""

from __future__ import annotations

PLAIN_STYLES: dict[str, str | list[dict[str, str]]] = {
    "chatml": """
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "llama-2": """
{%- if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set head = messages[0]['content'] %}
{%- else %}{% set turns = messages %}{% set head = false %}{% endif %}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant must take turns') }}
    {%- endif %}
    {%- if loop.index0 == 0 and head != false %}
        {%- set content = '<<SYS>>\\n' + head + '\\n<</SYS>>\\n\\n' + message['content'] %}
    {%- else %}{% set content = message['content'] %}{% endif %}
    {%- if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}""",
    "llama-3": """
{%- set loop_messages = messages %}
{%- for message in loop_messages %}
    {%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim %}
    {%- if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
    {{- content + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}""",
    "deepseek-v2": """
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n\\n' }}
    {%- elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}
    {%- elif message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}""",
    "mistral-small": """
{%- set today = strftime_now('%Y-%m-%d') %}
{%- set default_system_message = 'Today is ' + today + '.\\nYou know nothing after {year}.'.replace('{year}', '2023') %}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- if messages[0]['content'] is string %}{% set system_message = messages[0]['content'] %}
    {%- else %}{% set system_message = messages[0]['content'][0]['text'] %}{% endif %}
    {%- set loop_messages = messages[1:] %}
{%- else %}{% set system_message = default_system_message %}{% set loop_messages = messages %}{% endif %}
{{- '[SYSTEM_PROMPT]' + system_message + '[/SYSTEM_PROMPT]' }}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {%- if message['content'] is string %}{{ '[INST]' + message['content'] + '[/INST]' }}
        {%- else %}{{ '[INST]' }}
            {%- for block in message['content'] %}
                {%- if block['type'] == 'text' %}{{ block['text'] }}
                {%- elif block['type'] in ['image', 'image_url'] %}{{ '[IMG]' }}
                {%- else %}{{ raise_exception('text and images only') }}{% endif %}
            {%- endfor %}{{ '[/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' and message['content'] is string %}{{ message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}""",
    "gemma": """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
    {%- if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
    {{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}""",
    "gemma-3": """
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}{%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}{%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}{%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}{%- set first_user_prefix = '' -%}{%- set loop_messages = messages -%}{%- endif -%}
{%- for message in loop_messages -%}
    {{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' + (first_user_prefix if loop.first else '') }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{ raise_exception('Invalid content type') }}{%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}""",
    "phi-3": """{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{'<|system|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'user' %}{{'<|user|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>
' + message['content'] + '<|end|>
'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>
' }}{% else %}{{ eos_token }}{% endif %}""",
    "zephyr": """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "vicuna": """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content ~ ' ' }}{% elif m.role == 'user' %}{{ 'USER: ' ~ m.content ~ ' ' }}{% else %}{{ 'ASSISTANT: ' ~ m.content ~ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}
""",
    "alpaca": """{% set names = {'user': 'Instruction', 'assistant': 'Response', 'system': 'Context'} %}
{% for message in messages %}
### {{ names.get(message.role, message.role | title) }}:
{{ message.content | replace('\\r', '') | indent(2) }}

{% endfor %}
{% if add_generation_prompt %}### Response:
{% endif %}""",
    "internlm": """{{ bos_token }}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if (add_generation_prompt is defined and add_generation_prompt) or add_generation_prompt is not defined %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "olmo": """{% for message in messages %}{% if message['role'] == 'assistant' %}{% if not loop.last %}{{ '<|assistant|>\\n' + message['content'] + eos_token + '\\n' }}{% else %}{{ '<|assistant|>\\n' + message['content'] + eos_token }}{% endif %}{% else %}{{ '<|' ~ message['role'] ~ '|>\\n' ~ message['content'] ~ '\\n' }}{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}""",
    "smollm-3, with marked answers": """
{%- if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}
{%- set mode = '/think' if enable_thinking else '/no_think' %}
{%- if messages[0].role == 'system' and '/no_think' in messages[0].content %}{% set mode = '/no_think' %}{% endif %}
{{- '<|im_start|>system\\nMode: ' ~ mode ~ '\\nToday: ' ~ strftime_now('%d %B %Y') ~ '<|im_end|>\\n' }}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' %}{{ '<|im_start|>user\\n' ~ content ~ '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- generation %}
        {%- set inner = content | replace('<think>', '[') %}
        {{- '<|im_start|>assistant\\n' ~ inner.lstrip('\\n') ~ '<|im_end|>\\n' }}
        {%- endgeneration %}{{ inner is defined }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' if mode == '/think' else '<|im_start|>assistant\\n<think>\\n\\n</think>\\n' }}{% endif %}""",
    "loops that end early": """
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- if loop.index > 4 %}{% break %}{% endif %}
    {{- loop.cycle('A', 'B') ~ ': ' ~ message.content ~ '\\n' }}
{%- else %}nobody{% endfor %}
{%- set last = messages | map(attribute='role') | list | last %}{{ last }}{{ range(3) | list }}
{%- for role, group in messages | groupby('role') %}{{ role }}={{ group | length }};{% endfor %}""",
    "exaone": """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}{{ '[|' + message['role'] + '|]' + message['content'] }}{% if message['role'] == 'user' %}{{ '\\n' }}{% else %}{{ '[|endofturn|]\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}""",
    "phi-4-mini": """{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}""",
    "granite-3": """
{%- if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content'] %}{% set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = 'Knowledge Cutoff: April 2024.\\nDate: ' + strftime_now('%B %d, %Y') + '.' %}
    {%- if tools and documents %}{% set system_message = system_message + ' Tools, documents.' %}
    {%- elif tools %}{% set system_message = system_message + ' Tools.' %}
    {%- elif documents %}{% set system_message = system_message + ' Documents.' %}
    {%- elif thinking %}{% set system_message = system_message + ' Think.' %}
    {%- else %}{% set system_message = system_message + ' Help.' %}{% endif %}
    {%- if 'citations' in controls and documents %}{% set system_message = system_message + ' Cite.' %}{% endif %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\\n' }}
{%- if tools %}{{ '<|start_of_role|>tools<|end_of_role|>' }}{{ tools | tojson(indent=4) }}{{ '<|end_of_text|>\\n' }}{% endif %}
{%- if documents %}
    {{- '<|start_of_role|>documents<|end_of_role|>' }}
    {%- for document in documents %}
        {{- 'Document ' + loop.index0 | string + '\\n' }}{{ document['text'] }}
        {%- if not loop.last %}{{ '\\n\\n' }}{% endif %}
    {%- endfor %}{{ '<|end_of_text|>\\n' }}
{%- endif %}
{%- for message in loop_messages %}
    {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\\n' }}
    {%- if loop.last and add_generation_prompt %}
        {{- '<|start_of_role|>assistant' }}{% if controls %}{{ ' ' + controls | tojson() }}{% endif %}{{ '<|end_of_role|>' }}
    {%- endif %}
{%- endfor %}""",
    "nemotron": """{{ '<extra_id_0>System' }}{% for m in messages if m.role == 'system' %}{{ '\\n' + m.content | trim }}{% endfor %}{% if tools %}{% for tool in tools %}{{ '\\n<tool> ' + tool | tojson + ' </tool>' }}{% endfor %}{% endif %}{{ '\\n\\n' }}{% for m in messages if m.role != 'system' %}{{ '<extra_id_1>' + m.role | capitalize + '\\n' + (m.content or '') | trim + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<extra_id_1>Assistant\\n' }}{% endif %}""",
    "types": """{% set values = [tools, documents, messages, messages[0], add_generation_prompt, 1.0, 2] %}
{% for value in values %}{{ value is none }} {{ value is sequence }} {{ value is mapping }} {{ value is boolean }} {{ value is number }};{% endfor %}
{{ bos_token is defined }} {{ eos_token is defined }} {{ pad_token is defined }} {{ sep_token is defined }} {{ strftime_now is callable }}
{{ messages }} {{ messages | tojson(indent=2) }} {{ extra | default('none') | string }} {{ "<&'\\"é" | tojson }} {{ namespace is callable }} {{ joiner is callable }}""",
}
