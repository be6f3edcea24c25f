"""Tool calls of DeepSeek-V4: the format of V3.2 with another block tag."""

from sglang.srt.parser.tool_calls.deepseekv32 import MARK, DeepSeekV32Parser


class DeepSeekV4Parser(DeepSeekV32Parser):
    block_start, block_end = f"<{MARK}tool_calls>", f"</{MARK}tool_calls>"
