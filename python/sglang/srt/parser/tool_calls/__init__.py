"""One file and one class per format of tool calls; ``TOOL_CALL_PARSERS`` has them by value of --tool-call-parser."""

from sglang.srt.parser.tool_call_parser import ToolCallParser
from sglang.srt.parser.tool_calls.deepseekv3 import DeepSeekV3Parser
from sglang.srt.parser.tool_calls.deepseekv4 import DeepSeekV4Parser
from sglang.srt.parser.tool_calls.deepseekv31 import DeepSeekV31Parser
from sglang.srt.parser.tool_calls.deepseekv32 import DeepSeekV32Parser
from sglang.srt.parser.tool_calls.qwen3_coder import Qwen3CoderParser
from sglang.srt.parser.tool_calls.qwen25 import Qwen25Parser

TOOL_CALL_PARSERS: dict[str, type[ToolCallParser]] = {
    "deepseekv3": DeepSeekV3Parser,
    "deepseekv31": DeepSeekV31Parser,
    "deepseekv32": DeepSeekV32Parser,
    "deepseekv4": DeepSeekV4Parser,
    "qwen25": Qwen25Parser,
    "qwen3_coder": Qwen3CoderParser,
}
