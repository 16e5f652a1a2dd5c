# ruff: noqa: E501
"""Chat templates in the styles that published models use, written for these tests: those that write tool calls."""

from __future__ import annotations

TOOL_STYLES: dict[str, str | list[dict[str, str]]] = {
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
}
