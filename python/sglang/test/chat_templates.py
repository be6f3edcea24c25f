"""Chat templates of our own, built as those of served models are, for tests of what reaches the prompt."""

# Roles by branches without an else; tool calls only where the content is null; arguments are concatenated as text.
DEEPSEEK_V3 = """
{%- set ns = namespace(system='', after_tool=false, first_call=true, first_output=true) -%}
{%- for m in messages -%}
  {%- if m['role'] == 'system' -%}
    {%- set ns.system = ns.system + ('\n\n' if ns.system else '') + m['content'] -%}
  {%- endif -%}
{%- endfor -%}
{{- bos_token + ns.system -}}
{%- for m in messages -%}
  {%- if m['role'] == 'user' -%}
    {%- set ns.after_tool = false -%}
    {{- '<|User|>' + m['content'] -}}
  {%- endif -%}
  {%- if m['role'] == 'assistant' and m['content'] is none -%}
    {%- set ns.after_tool = false -%}
    {%- for call in m['tool_calls'] -%}
      {{- ('<|Assistant|><|calls|>' if loop.first else '\n') + '<|call|>' + call['type'] + '<|sep|>' -}}
      {{- call['function']['name'] + '\n```json\n' + call['function']['arguments'] + '\n```<|/call|>' -}}
    {%- endfor -%}
    {{- '<|/calls|>' + eos_token -}}
  {%- endif -%}
  {%- if m['role'] == 'assistant' and m['content'] is not none -%}
    {%- set answer = m['content'] -%}
    {%- if '</think>' in answer -%}{%- set answer = answer.split('</think>')[-1] -%}{%- endif -%}
    {{- ('<|/outputs|>' if ns.after_tool else '<|Assistant|>') + answer + eos_token -}}
    {%- set ns.after_tool = false -%}
  {%- endif -%}
  {%- if m['role'] == 'tool' -%}
    {%- set ns.after_tool = true -%}
    {{- ('<|outputs|>' if ns.first_output else '\n') + '<|output|>' + m['content'] + '<|/output|>' -}}
    {%- set ns.first_output = false -%}
  {%- endif -%}
{%- endfor -%}
{%- if ns.after_tool -%}{{- '<|/outputs|>' -}}{%- elif add_generation_prompt -%}{{- '<|Assistant|>' -}}{%- endif -%}
"""

# As V3, but branches on the presence of the key tool_calls, with or without content, and opens a thought.
DEEPSEEK_R1 = """
{{- bos_token -}}
{%- for m in messages if m['role'] == 'system' -%}{{- m['content'] -}}{%- endfor -%}
{%- set ns = namespace(after_tool=false) -%}
{%- for m in messages -%}
  {%- if m['role'] == 'user' -%}{%- set ns.after_tool = false -%}{{- '<|User|>' + m['content'] -}}{%- endif -%}
  {%- if m['role'] == 'assistant' and 'tool_calls' in m -%}
    {%- set ns.after_tool = false -%}
    {{- '<|Assistant|>' -}}
    {%- if m['content'] is not none -%}{{- m['content'] -}}{%- endif -%}
    {{- '<|calls|>' -}}
    {%- for call in m['tool_calls'] -%}
      {{- '<|call|>' + call['type'] + '<|sep|>' + call['function']['name'] + '\n```json\n' -}}
      {{- call['function']['arguments'] + '\n```<|/call|>' -}}
    {%- endfor -%}
    {{- '<|/calls|>' + eos_token -}}
  {%- endif -%}
  {%- if m['role'] == 'assistant' and 'tool_calls' not in m -%}
    {%- set answer = m['content'] -%}
    {%- if '</think>' in answer -%}{%- set answer = answer.split('</think>')[-1] -%}{%- endif -%}
    {{- ('' if ns.after_tool else '<|Assistant|>') + answer + eos_token -}}
    {%- set ns.after_tool = false -%}
  {%- endif -%}
  {%- if m['role'] == 'tool' -%}
    {%- set ns.after_tool = true -%}
    {{- '<|output|>' + m['content'] + '<|/output|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not ns.after_tool -%}{{- '<|Assistant|><think>\n' -}}{%- endif -%}
"""

# Asks whether tool_calls is defined and not null; a switch for thinking.
DEEPSEEK_V31 = """
{%- if thinking is not defined -%}{%- set thinking = false -%}{%- endif -%}
{{- bos_token -}}
{%- set ns = namespace(last_user=false, after_tool=false) -%}
{%- for m in messages if m['role'] == 'system' -%}
  {{- m['content'] + ('' if loop.last else '\n\n') -}}
{%- endfor -%}
{%- for m in messages -%}
  {%- if m['role'] == 'user' -%}
    {%- set ns.after_tool = false -%}{%- set ns.last_user = true -%}
    {{- '<|User|>' + m['content'] -}}
  {%- endif -%}
  {%- if m['role'] == 'assistant' and m['tool_calls'] is defined and m['tool_calls'] is not none -%}
    {%- if ns.last_user -%}{{- '<|Assistant|></think>' -}}{%- endif -%}
    {%- set ns.last_user = false -%}{%- set ns.after_tool = false -%}
    {%- for call in m['tool_calls'] -%}
      {%- set text = call['function']['name'] + '<|sep|>' + call['function']['arguments'] + '<|/call|>' -%}
      {%- if loop.first and m['content'] is not none -%}{{- m['content'] -}}{%- endif -%}
      {{- ('<|calls|>' if loop.first else '') + '<|call|>' + text -}}
    {%- endfor -%}
    {{- '<|/calls|>' + eos_token -}}
  {%- endif -%}
  {%- if m['role'] == 'assistant' and (m['tool_calls'] is not defined or m['tool_calls'] is none) -%}
    {%- if ns.last_user -%}
      {{- '<|Assistant|>' + ('<think>' if m['prefix'] is defined and m['prefix'] and thinking else '</think>') -}}
    {%- endif -%}
    {%- set ns.last_user = false -%}{%- set ns.after_tool = false -%}
    {%- set answer = m['content'] -%}
    {%- if '</think>' in answer -%}{%- set answer = answer.split('</think>', 1)[1] -%}{%- endif -%}
    {{- answer + eos_token -}}
  {%- endif -%}
  {%- if m['role'] == 'tool' -%}
    {%- set ns.last_user = false -%}{%- set ns.after_tool = true -%}
    {{- '<|output|>' + m['content'] + '<|/output|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and ns.last_user -%}
  {{- '<|Assistant|>' + ('<think>' if thinking else '</think>') -}}
{%- endif -%}
"""

# Content only where it is a string; arguments as text or as an object; thoughts of earlier turns are left out.
QWEN3 = """
{%- if tools -%}{{- '<|im_start|>system\nTools:' -}}
  {%- for tool in tools -%}{{- '\n' + (tool | tojson) -}}{%- endfor -%}{{- '<|im_end|>\n' -}}
{%- endif -%}
{%- set ns = namespace(searching=true, last=messages|length - 1) -%}
{%- for m in messages[::-1] -%}
  {%- if ns.searching and m.role == 'user' and m.content is string
      and not (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) -%}
    {%- set ns.searching = false -%}{%- set ns.last = messages|length - 1 - loop.index0 -%}
  {%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
  {%- set content = m.content if m.content is string else '' -%}
  {%- if m.role in ('user', 'system') -%}
    {{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' -}}
  {%- elif m.role == 'assistant' -%}
    {%- set thought = '' -%}
    {%- if m.reasoning_content is string -%}
      {%- set thought = m.reasoning_content -%}
    {%- elif '</think>' in content -%}
      {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}
      {%- set content = content.split('</think>')[-1].lstrip('\n') -%}
    {%- endif -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if loop.index0 > ns.last and (loop.last or thought) -%}
      {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' -}}
    {%- endif -%}
    {{- content -}}
    {%- for call in m.tool_calls or [] -%}
      {%- if (loop.first and content) or not loop.first -%}{{- '\n' -}}{%- endif -%}
      {%- set call = call.function if call.function else call -%}
      {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' -}}
      {%- if call.arguments is string -%}{{- call.arguments -}}{%- else -%}{{- call.arguments | tojson -}}{%- endif -%}
      {{- '}\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
  {%- elif m.role == 'tool' -%}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
    {{- '\n<tool_response>\n' + content + '\n</tool_response>' -}}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' -}}
  {%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}
"""

# Tool calls as tags of each argument, so arguments must be an object; content is trimmed where it is a string.
QWEN3_CODER = """
{%- for m in messages -%}
  {%- if m.role == 'assistant' and m.tool_calls is defined and m.tool_calls is iterable and m.tool_calls -%}
    {{- '<|im_start|>assistant' -}}
    {%- if m.content is defined and m.content is string and m.content|trim -%}
      {{- '\n' + m.content|trim + '\n' -}}
    {%- endif -%}
    {%- for call in m.tool_calls -%}
      {%- if call.function is defined -%}{%- set call = call.function -%}{%- endif -%}
      {{- '\n<tool_call>\n<function=' + call.name + '>\n' -}}
      {%- if call.arguments is defined -%}
        {%- for key, value in call.arguments|items -%}
          {{- '<parameter=' + key + '>\n' -}}
          {{- value if value is string else value | tojson -}}
          {{- '\n</parameter>\n' -}}
        {%- endfor -%}
      {%- endif -%}
      {{- '</function>\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
  {%- elif m.role in ('user', 'system', 'assistant') -%}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
  {%- elif m.role == 'tool' -%}
    {%- if loop.first or loop.previtem.role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
    {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' -}}
    {%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}
  {%- else -%}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

# A macro walks over the parts of a content; unknown roles raise; arguments are an object.
QWEN3_5 = """
{%- macro show(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- elif content is iterable and content is not mapping -%}
    {%- for part in content -%}
      {%- if 'image' in part or part.type == 'image' -%}
        {{- '<|image|>' -}}
      {%- elif 'text' in part -%}
        {{- part.text -}}
      {%- else -%}
        {{- raise_exception('a part of a kind that this model does not read') -}}
      {%- endif -%}
    {%- endfor -%}
  {%- elif content is none or content is undefined -%}
    {{- '' -}}
  {%- else -%}
    {{- raise_exception('content must be text or parts') -}}
  {%- endif -%}
{%- endmacro -%}
{%- if not messages -%}{{- raise_exception('no messages') -}}{%- endif -%}
{%- for m in messages -%}
  {%- set content = show(m.content)|trim -%}
  {%- if m.role == 'system' -%}
    {%- if not loop.first -%}{{- raise_exception('the system message must come first') -}}{%- endif -%}
    {{- '<|im_start|>system\n' + content + '<|im_end|>\n' -}}
  {%- elif m.role == 'user' -%}
    {{- '<|im_start|>user\n' + content + '<|im_end|>\n' -}}
  {%- elif m.role == 'assistant' -%}
    {%- set thought = '' -%}
    {%- if m.reasoning_content is string -%}
      {%- set thought = m.reasoning_content -%}
    {%- elif '</think>' in content -%}
      {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}
      {%- set content = content.split('</think>')[-1].lstrip('\n') -%}
    {%- endif -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if loop.last -%}{{- '<think>\n' + thought|trim + '\n</think>\n\n' -}}{%- endif -%}
    {{- content -}}
    {%- if m.tool_calls and m.tool_calls is iterable and m.tool_calls is not mapping -%}
      {%- for call in m.tool_calls -%}
        {%- if call.function is defined -%}{%- set call = call.function -%}{%- endif -%}
        {{- ('\n\n' if loop.first and content|trim else '' if loop.first else '\n') + '<tool_call>\n' -}}
        {{- '<function=' + call.name + '>\n' -}}
        {%- if call.arguments is defined -%}
          {%- for key, value in call.arguments|items -%}
            {{- '<parameter=' + key + '>\n' -}}
            {{- value | tojson | safe if value is mapping or value is sequence and value is not string
                else value | string -}}
            {{- '\n</parameter>\n' -}}
          {%- endfor -%}
        {%- endif -%}
        {{- '</function>\n</tool_call>' -}}
      {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\n' -}}
  {%- elif m.role == 'tool' -%}
    {%- if loop.previtem and loop.previtem.role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
    {{- '\n<tool_response>\n' + content + '\n</tool_response>' -}}
    {%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}
  {%- else -%}
    {{- raise_exception('unexpected role ' + m.role) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' -}}
  {%- if enable_thinking is defined and enable_thinking is false -%}
    {{- '<think>\n\n</think>\n\n' -}}
  {%- else -%}
    {{- '<think>\n' -}}
  {%- endif -%}
{%- endif -%}
"""

STYLES = {
    "deepseek-v3": DEEPSEEK_V3,
    "deepseek-r1": DEEPSEEK_R1,
    "deepseek-v3.1": DEEPSEEK_V31,
    "qwen3": QWEN3,
    "qwen3-coder": QWEN3_CODER,
    "qwen3.5": QWEN3_5,
}
