# ruff: noqa: E501
"""Chat templates in the styles that published models use, written for these tests: what they ask of a renderer."""

from __future__ import annotations

from typing import Any

STYLES: dict[str, str | list[dict[str, str]]] = {
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
    "llama-3.x with tools": """
{{- bos_token }}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- if not tools_in_user_message is defined %}{% set tools_in_user_message = true %}{% endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}
    {%- else %}{% set date_string = '26 Jul 2024' %}{% endif %}
{%- endif %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system_message = '' %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if builtin_tools is defined or tools is not none %}{{ 'Environment: ipython\\n' }}{% endif %}
{%- if builtin_tools is defined %}{{ 'Tools: ' + builtin_tools | reject('equalto', 'x') | join(', ') }}{% endif %}
{{- 'Today: ' + date_string + '\\n\\n' }}
{%- if tools is not none and not tools_in_user_message %}
    {%- for t in tools %}{{ t | tojson(indent=4) }}{{ '\\n\\n' }}{% endfor %}
{%- endif %}
{{- system_message + '<|eot_id|>' }}
{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length != 0 %}
        {%- set first = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
    {%- else %}{{ raise_exception('no user message') }}{% endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\nFunctions:\\n\\n' }}
    {%- for t in tools %}{{ t | tojson(indent=4) }}{{ '\\n\\n' }}{% endfor %}
    {{- first + '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{ raise_exception('one call at a time') }}{% endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{ '}<|eot_id|>' }}
    {%- elif message.role == 'tool' or message.role == 'ipython' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
        {%- if message.content is mapping or message.content is iterable %}{{ message.content | tojson }}
        {%- else %}{{ message.content }}{% endif %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}""",
    "qwen2.5": """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}{{ 'Be helpful.' }}{% endif %}
    {{- '\\n\\n# Tools\\n\\n<tools>' }}
    {%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}
    {{- '\\n</tools>\\n<tool_call>\\n{"name": <name>, "arguments": <object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0]['role'] == 'system' %}{{ '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) or
           (message.role == 'assistant' and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{ '\\n' + message.content }}{% endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{% set tool_call = tool_call.function %}{% endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{ tool_call.name }}{{ '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{ '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != 'tool') %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' }}{{ message.content }}{{ '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != 'tool') %}{{ '<|im_end|>\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "qwen3": """
{%- set ns = namespace(multi_step=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == 'user' and message.content is string and
           not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step = false %}{% set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{% set content = message.content %}{% else %}{% set content = '' %}{% endif %}
    {%- if message.role == 'user' or message.role == 'system' %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}{% set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or reasoning_content) %}
            {{- '<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {%- if call.function.arguments is string %}{{ call.function.arguments }}
            {%- else %}{{ call.function.arguments | tojson }}{% endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}""",
    "deepseek-v2": """
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n\\n' }}
    {%- elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}
    {%- elif message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}""",
    "deepseek-v3": """
{%- set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='', is_first_sp=true) %}
{%- for message in messages %}{% if message['role'] == 'system' %}
    {%- if ns.is_first_sp %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}{% set ns.is_first_sp = false %}
    {%- else %}{% set ns.system_prompt = ns.system_prompt + '\\n\\n' + message['content'] %}{% endif %}
{%- endif %}{% endfor %}
{{- bos_token }}{{ ns.system_prompt }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{% set ns.is_tool = false %}{{ '<|User|>' + message['content'] }}{% endif %}
    {%- if message['role'] == 'assistant' and message['content'] is none %}
        {%- set ns.is_tool = false %}
        {%- for tool in message['tool_calls'] %}
            {%- if not ns.is_first %}
                {{- '<|Assistant|><|calls|><|call|>' + tool['type'] + '<|sep|>' + tool['function']['name'] + '\\n```json\\n' }}
                {{- tool['function']['arguments'] + '\\n```<|call_end|>' }}{% set ns.is_first = true %}
            {%- else %}{{ '\\n<|call|>' + tool['type'] + '<|sep|>' + tool['function']['name'] + '<|call_end|>' }}
                {{- '<|calls_end|><|end|>' }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {%- if message['role'] == 'assistant' and message['content'] is not none %}
        {%- if ns.is_tool %}{{ '<|outputs_end|>' + message['content'] + '<|end|>' }}{% set ns.is_tool = false %}
        {%- else %}
            {%- set content = message['content'] %}
            {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
            {{- '<|Assistant|>' + content + '<|end|>' }}
        {%- endif %}
    {%- endif %}
    {%- if message['role'] == 'tool' %}
        {%- set ns.is_tool = true %}
        {%- if ns.is_output_first %}{{ '<|outputs|><|output|>' + message['content'] + '<|output_end|>' }}
            {%- set ns.is_output_first = false %}
        {%- else %}{{ '\\n<|output|>' + message['content'] + '<|output_end|>' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if ns.is_tool %}{{ '<|outputs_end|>' }}{% endif %}
{%- if add_generation_prompt and not ns.is_tool %}{{ '<|Assistant|><think>\\n' }}{% endif %}""",
    "deepseek-v3.1": """
{%- if not thinking is defined %}{% set thinking = false %}{% endif %}
{%- set ns = namespace(system='', is_first=true, last_user=false) %}
{%- for message in messages if message.role == 'system' %}{% set ns.system = ns.system + message.content %}{% endfor %}
{{- bos_token }}{{ ns.system }}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last_user = true %}{{ '<|User|>' + message.content }}{% endif %}
    {%- if message.role == 'assistant' and message.tool_calls is defined and message.tool_calls is not none %}
        {%- if ns.last_user %}{{ '<|Assistant|></think>' }}{% endif %}
        {%- set ns.last_user = false %}
        {%- for tool in message.tool_calls %}
            {{- '<|call|>' + tool.function.name + '<|sep|>' }}
            {%- if tool.function.arguments is string %}{{ tool.function.arguments }}
            {%- else %}{{ tool.function.arguments | tojson }}{% endif %}{{ '<|call_end|>' }}
        {%- endfor %}
    {%- elif message.role == 'assistant' %}
        {%- if ns.last_user %}
            {{- '<|Assistant|>' }}
            {%- if message.prefix is defined and message.prefix and thinking %}{{ '<think>' }}{% else %}{{ '</think>' }}{% endif %}
        {%- endif %}
        {%- set ns.last_user = false %}
        {%- set content = message.content | default('', true) %}
        {%- if '</think>' in content %}{% set content = content.split('</think>', 1)[1] %}{% endif %}
        {{- content + eos_token }}
    {%- endif %}
    {%- if message.role == 'tool' %}{% set ns.last_user = false %}{{ '<|output|>' + message.content + '<|output_end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt and ns.last_user %}
    {{- '<|Assistant|>' }}{% if not thinking %}{{ '</think>' }}{% else %}{{ '<think>' }}{% endif %}
{%- endif %}""",
    "kimi-k2": """
{%- macro render_content(msg) -%}
    {%- set c = msg.get('content') -%}
    {%- if c is string -%}{{ c }}
    {%- elif c is not none -%}
        {%- for part in c -%}
            {%- if part['type'] == 'image' -%}<|media|>{%- else -%}{{ part['text'] }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if tools -%}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', ':')) }}<|im_end|>{%- endif -%}
{%- for message in messages -%}
    {%- if loop.first and messages[0]['role'] != 'system' -%}<|im_system|>system<|im_middle|>Be Kimi.<|im_end|>{%- endif -%}
    {%- set name = message.get('name') or message['role'] -%}
    {%- if message['role'] == 'user' -%}<|im_user|>{{ name }}<|im_middle|>
    {%- elif message['role'] == 'assistant' -%}<|im_assistant|>{{ name }}<|im_middle|>
    {%- else -%}<|im_system|>{{ name }}<|im_middle|>{%- endif -%}
    {%- if message['role'] == 'assistant' and message.get('tool_calls') -%}
        {{- render_content(message) -}}<|calls|>
        {%- for call in message['tool_calls'] -%}
            <|call|>{{ call['id'] }}<|arguments|>{% if call['function']['arguments'] is string %}{{ call['function']['arguments'] }}{% else %}{{ call['function']['arguments'] | tojson }}{% endif %}<|call_end|>
        {%- endfor -%}<|calls_end|>
    {%- elif message['role'] == 'tool' -%}## Return of {{ message.tool_call_id }}
{{ render_content(message) }}
    {%- else -%}{{ render_content(message) }}{%- endif -%}
    <|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}""",
    "glm-4.5": """[gMASK]<sop>
{%- macro visible(content) -%}
    {%- if content is string -%}{{ content }}
    {%- elif content is iterable and content is not mapping -%}
        {%- for item in content -%}
            {%- if item is mapping and item.type == 'text' -%}{{ item.text }}
            {%- elif item is string -%}{{ item }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{ content }}{%- endif -%}
{%- endmacro -%}
{%- if tools %}<|system|>
# Tools
{% for tool in tools %}{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}{% endif -%}
{%- set ns = namespace(last_user_index=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last_user_index = loop.index0 -%}{% endif %}{%- endfor %}
{%- for m in messages -%}
{%- if m.role == 'user' -%}<|user|>
{{ visible(m.content) }}{{- '/nothink' if (enable_thinking is defined and not enable_thinking and not visible(m.content).endswith('/nothink')) else '' -}}
{%- elif m.role == 'assistant' -%}<|assistant|>
{%- set reasoning_content = '' %}{% set content = visible(m.content) %}
{%- if m.reasoning_content is string %}{% set reasoning_content = m.reasoning_content %}{% endif %}
{%- if loop.index0 > ns.last_user_index and reasoning_content -%}{{ '\\n<think>' + reasoning_content.strip() + '</think>' }}
{%- else -%}{{ '\\n<think></think>' }}{%- endif -%}
{%- if content.strip() -%}{{ '\\n' + content.strip() }}{%- endif -%}
{%- if m.tool_calls -%}{% for tc in m.tool_calls %}{%- if tc.function %}{%- set tc = tc.function %}{%- endif %}
{{- '\\n<tool_call>' + tc.name }}
{% set args = tc.arguments %}{% if args is mapping %}{% for k, v in args.items() %}<arg_key>{{ k }}</arg_key>
<arg_value>{{ v | tojson(ensure_ascii=False) if v is not string else v }}</arg_value>
{% endfor %}{% endif %}</tool_call>{% endfor %}{%- endif %}
{%- elif m.role == 'tool' -%}
{%- if loop.first or (messages[loop.index0 - 1].role != 'tool') -%}{{- '<|observation|>' -}}{%- endif -%}
{{- '\\n<tool_response>\\n' + visible(m.content) + '\\n</tool_response>' -}}
{%- elif m.role == 'system' -%}<|system|>
{{ visible(m.content) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{{- '\\n<think></think>' if (enable_thinking is defined and not enable_thinking) else '' -}}{%- endif -%}""",
    "mistral-v3": """
{%- if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content'] %}{% set loop_messages = messages[1:] %}
{%- else %}{% set loop_messages = messages %}{% endif %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- set user_messages = loop_messages | selectattr('role', 'equalto', 'user') | list %}
{%- set ns = namespace() %}{% set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == 'tool' or message.role == 'tool_results' or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message['role'] == 'user') != (ns.index % 2 == 0) %}{{ raise_exception('roles must take turns: user, assistant, …') }}{% endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- '[AVAILABLE_TOOLS] [' }}
            {%- for tool in tools %}{% set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != 'return' %}
                    {%- if val is string %}{{ '"' + key + '": "' + val + '"' }}{% else %}{{ '"' + key + '": ' + val | tojson }}{% endif %}
                    {%- if not loop.last %}{{ ', ' }}{% endif %}
                {%- endfor %}
                {{- '}}' }}{% if not loop.last %}{{ ', ' }}{% else %}{{ ']' }}{% endif %}
            {%- endfor %}
            {{- '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}{{ '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}
        {%- else %}{{ '[INST] ' + message['content'] + '[/INST]' }}{% endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- '[TOOL_CALLS] [' }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function | tojson %}{{ out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id | length != 9 %}{{ raise_exception('ids of calls have 9 characters') }}{% endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}{% if not loop.last %}{{ ', ' }}{% else %}{{ ']' + eos_token }}{% endif %}
        {%- endfor %}
    {%- elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}
    {%- elif message['role'] == 'tool' %}{{ '[TOOL_RESULTS] {"content": ' + message.content | string + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}{{ raise_exception('Only user, assistant and tool, not ' + message['role']) }}{% endif %}
{%- endfor %}""",
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
    "phi-4-mini": """{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}""",
    "command-r, named": [
        {
            "name": "default",
            "template": "{{ bos_token }}{% for message in messages %}<|START|><|{{ message.role | upper }}|>"
            "{{ message.content.strip() if message.content }}<|END|>{% endfor %}"
            "{% if add_generation_prompt %}<|START|><|CHATBOT|>{% endif %}",
        },
        {
            "name": "tool_use",
            "template": """
{%- macro json_to_python_type(json_spec) %}
    {%- set basic = {'string': 'str', 'number': 'float', 'integer': 'int', 'boolean': 'bool'} %}
    {%- if basic[json_spec.type] is defined %}{{ basic[json_spec.type] }}
    {%- elif json_spec.type == 'array' %}{{ 'List[' + json_to_python_type(json_spec['items']) + ']' }}
    {%- elif json_spec.type is iterable %}{{ 'Union[' }}{% for t in json_spec.type %}{{ json_to_python_type({'type': t}) }}{% if not loop.last %}{{ ',' }}{% endif %}{% endfor %}{{ ']' }}
    {%- else %}{{ 'Any' }}{% endif %}
{%- endmacro %}
{{- bos_token }}{% for tool in tools %}{% set fn = tool.function %}
{{- '\\ndef ' + fn.name + '(' }}{% for name, field in fn.parameters.properties.items() %}
{{- name + ': ' }}{% if not name in fn.parameters.required %}{{ 'Optional[' + json_to_python_type(field) + '] = None' }}{% else %}{{ json_to_python_type(field) }}{% endif %}
{%- if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}{{ ') # ' + fn.description + '\\n' }}{% endfor %}
{%- for m in messages %}{{ '[' + m.role + ']' + (m.content or m.tool_calls | tojson) }}{% endfor %}""",
        },
        {
            "name": "rag",
            "template": "{{ bos_token }}<results>{% for document in documents %}\nDocument: {{ loop.index0 }}\n"
            "{% for key, value in document.items() %}{{ key }}: {{ value }}\n{% endfor %}{% endfor %}</results>"
            "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}",
        },
    ],
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
    "hermes": """
{%- if tools %}{{ bos_token + '<|im_start|>system\\n<tools> ' }}
{%- for tool in tools %}
    {%- if tool.function is defined %}{% set tool = tool.function %}{% endif %}
    {{- '{"type": "function", "function": ' }}{{ dict(name=tool.name, description=tool.description) | tojson }}
    {{- ', "required": ' + (tool.parameters.required | default([])) | tojson + '}' }}{% if not loop.last %}{{ '\\n' }}{% endif %}
{%- endfor %}{{ ' </tools><|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {%- if message.role in ('user', 'system') or (message.role == 'assistant' and message.tool_calls is not defined) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role }}
        {%- for tool_call in message.tool_calls %}
            {{- '\\n<tool_call>\\n' + tool_call.function | tojson(sort_keys=true) + '\\n</tool_call>' }}
        {%- endfor %}{{ '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.previtem and loop.previtem.role != 'tool' %}{{ '<|im_start|>tool\\n' }}{% endif %}
        {{- '<tool_response>\\n' + message.content }}{{ '\\n</tool_response>' if not loop.last else '\\n</tool_response>\\n' }}
        {%- if not loop.last and loop.nextitem.role != 'tool' or loop.last %}{{ '<|im_end|>' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
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
    "gpt-oss": """
{%- macro type_of(spec) -%}
    {%- if spec.type == 'array' -%}{{ type_of(spec['items']) }}[]
    {%- elif spec.enum -%}{{ '"' ~ spec.enum | join('" | "') ~ '"' }}
    {%- else -%}{{ {'integer': 'number'}.get(spec.type, spec.type) }}{%- endif -%}
{%- endmacro -%}
<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}
Reasoning: {{ reasoning_effort | default('medium') }}
# Valid channels: analysis, final.<|end|>
{%- if messages[0].role in ['developer', 'system'] %}<|start|>developer<|message|># Instructions

{{ messages[0].content }}<|end|>{% endif %}
{%- if tools %}namespace functions {
{% for tool in tools %}// {{ tool.function.description }}
type {{ tool.function.name }} = (_: {
{% for name, spec in tool.function.parameters.properties.items() %}{{ name }}{{ '?' if name not in tool.function.parameters.required }}: {{ type_of(spec) }},
{% endfor %}}) => any;
{% endfor %}}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- if 'tool_calls' in message %}
            {%- if message.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ message.thinking }}<|end|>{% endif %}
            {%- set call = message.tool_calls[0].function %}
            {{- '<|start|>assistant to=functions.' ~ call.name ~ '<|channel|>commentary json<|message|>' ~ call.arguments | tojson ~ '<|call|>' }}
        {%- else %}
            {%- if loop.last and not add_generation_prompt and message.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ message.thinking }}<|end|>{% endif %}
            {{- '<|start|>assistant<|channel|>final<|message|>' ~ message.content ~ '<|end|>' }}
        {%- endif %}
    {%- elif message.role == 'tool' %}<|start|>functions to=assistant<|message|>{{ message.content | tojson }}<|end|>
    {%- elif message.role == 'user' %}{{ '<|start|>user<|message|>' ~ message.content ~ '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}""",
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
    "jamba": """
{%- set ns = namespace(message_count=0, is_last_checked_defined=false) %}
{{- bos_token }}
{%- for message in messages %}
    {%- set ns.message_count = ns.message_count + 1 %}
    {%- if documents is defined and documents and loop.last %}{{ '<documents>' ~ documents | map(attribute='title') | join('; ') ~ '</documents>' }}{% endif %}
    {{- '<|bom|><|' ~ message.role ~ '|> ' }}
    {%- if message.content is defined and message.content is not none %}{{ message.content | string }}{% endif %}
    {%- if message.tool_calls %}{{ message.tool_calls | map(attribute='function') | map('tojson') | list }}{% endif %}
    {{- '<|eom|>' }}
{%- endfor %}
{%- if unk_token is defined %}unknown is {{ unk_token }}{% endif %}
{{- '<|bom|><|assistant|>' if add_generation_prompt }}{{ ns.message_count }}""",
    "nemotron": """{{ '<extra_id_0>System' }}{% for m in messages if m.role == 'system' %}{{ '\\n' + m.content | trim }}{% endfor %}{% if tools %}{% for tool in tools %}{{ '\\n<tool> ' + tool | tojson + ' </tool>' }}{% endfor %}{% endif %}{{ '\\n\\n' }}{% for m in messages if m.role != 'system' %}{{ '<extra_id_1>' + m.role | capitalize + '\\n' + (m.content or '') | trim + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<extra_id_1>Assistant\\n' }}{% endif %}""",
    "types": """{% set values = [tools, documents, messages, messages[0], add_generation_prompt, 1.0, 2] %}
{% for value in values %}{{ value is none }} {{ value is sequence }} {{ value is mapping }} {{ value is boolean }} {{ value is number }};{% endfor %}
{{ bos_token is defined }} {{ eos_token is defined }} {{ pad_token is defined }} {{ sep_token is defined }} {{ strftime_now is callable }}
{{ messages }} {{ messages | tojson(indent=2) }} {{ extra | default('none') | string }} {{ "<&'\\"é" | tojson }} {{ namespace is callable }} {{ joiner is callable }}""",
}

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather <of> a place & a day",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "A town: «Köln», 東京"},
                "days": {"type": "array", "items": {"type": "integer"}},
                "unit": {"type": ["string", "number"]},
            },
            "required": ["place"],
        },
    },
}
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "weather", "arguments": {"place": "Köln", "days": [1, 2]}},
}
USER = {"role": "user", "content": "  What is 2 + 2?\n"}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "a question": [USER],
    "a system prompt": [{"role": "system", "content": "Be brief. 🐋"}, USER],
    "several turns": [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "<think>\nadd\n</think>\n\n 4 \n"},
        {"role": "user", "content": 'And "3"?'},
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": "Sure?"},
    ],
    "an answer at the end": [USER, {"role": "assistant", "content": "Four, ", "reasoning": "2 and 2"}],
    "no alternation": [USER, USER],
    "calls": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "reasoning_content": "ask", "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": '{"sky": "grey"}'},
        {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "12 °C"},
    ],
    "calls without content": [
        {"role": "user", "content": "Weather?", "name": None},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call00001", "content": "grey"},
        {"role": "assistant", "content": "It is grey.", "tool_calls": None},
        {"role": "user", "content": "Thanks"},
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "Look: "}, {"type": "image"}]}],
}

DOCUMENTS = [{"title": "One", "text": "1 < 2"}, {"title": "Zwei", "text": "größer"}]

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no generation prompt": {"add_generation_prompt": False},
    "tools": {"tools": [WEATHER, WEATHER]},
    "documents": {"documents": DOCUMENTS, "controls": {"citations": True}},
    "thinking": {"thinking": True, "enable_thinking": True, "reasoning_effort": "high"},
    "no thinking": {"thinking": False, "enable_thinking": False, "extra": [1, 2.5, None, True, {"a": "b"}]},
    "a special token of one's own": {"bos_token": "<s>", "date_string": "1 May 2024"},
}
