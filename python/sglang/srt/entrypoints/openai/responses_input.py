"""From a body of ``/v1/responses`` to one of ``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.entrypoints.openai.responses_protocol import ResponsesRequest
from sglang.srt.managers.request_input import RequestError

_STATELESS = "nothing is stored between requests: send the whole conversation in input"
# Unsupported fields, and why; null and false have no effect.
_REFUSED = {
    "previous_response_id": _STATELESS,
    "conversation": _STATELESS,
    "prompt": "there are no stored prompts: use instructions and input",
    "background": "there is no response to come back for: use stream",
    "max_tool_calls": "the server does not call tools",
    "top_logprobs": "use /v1/chat/completions",
}
_TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
# Fields that pass unchanged.
_SAME = (
    "model", "temperature", "top_p", "stream", "parallel_tool_calls", "top_k", "min_p", "seed", "repetition_penalty",
    "chat_template_kwargs", "request_timeout", "return_warnings",
)  # fmt: skip


def chat_body(body: ResponsesRequest) -> ChatCompletionRequest:
    """The same request. Raises RequestError that names what is not supported."""
    for name, reason in _REFUSED.items():
        if getattr(body, name):
            raise RequestError(f"{name} is not supported by this server: {reason}.", param=name)
    if body.truncation not in (None, "disabled"):
        raise RequestError("truncation must be 'disabled': a conversation is never cut on request.", param="truncation")
    if "message.output_text.logprobs" in (body.include or ()):
        raise RequestError("message.output_text.logprobs is not supported: use /v1/chat/completions.", param="include")
    messages = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    messages += _messages(body.input)
    return ChatCompletionRequest(
        messages=messages,
        max_completion_tokens=body.max_output_tokens,
        tools=None if body.tools is None else [_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools)],
        tool_choice=_tool_choice(body.tool_choice),
        response_format=_response_format(body.text.format if body.text is not None else None),
        reasoning_effort=body.reasoning.effort if body.reasoning is not None else None,
        **{name: getattr(body, name) for name in _SAME},
    )


def _messages(given: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages of a conversation; thoughts and calls are merged into the assistant's turn next to them."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    thought = ""
    for number, item in enumerate(given):
        where = f"input[{number}]"
        kind = item.get("type", "message")
        if kind == "reasoning":
            thought += _text(item.get("content") or [], f"{where}.content")
        elif kind == "function_call":
            turn = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
            if turn is None:
                turn = {"role": "assistant", "content": None}
                messages.append(turn)
            turn.setdefault("tool_calls", []).append(_call(item, where))
        elif kind == "function_call_output":
            output = _text(item.get("output"), f"{where}.output")
            messages.append({"role": "tool", "tool_call_id": _named(item, "call_id", where), "content": output})
        elif kind == "message":
            content = item.get("content")
            if not isinstance(content, str):
                content = [{"type": "text", "text": text} for text in _texts(content, f"{where}.content")]
            messages.append({"role": item.get("role"), "content": content})
        else:
            raise RequestError(
                f"{where}.type {kind!r:.100} is not supported: items are messages, thoughts, function calls and their "
                f"outputs; {_STATELESS if kind == 'item_reference' else 'only text is served'}.",
                param="input",
            )
        if thought and kind != "reasoning":
            _keep_thought(messages, len(messages) - 1, thought)
            thought = ""
    if thought:
        _keep_thought(messages, len(messages), thought)
    return messages


def _keep_thought(messages: list[dict[str, Any]], at: int, thought: str) -> None:
    """Add a thought to the assistant's turn at ``at`` or, where that is none, to the one before; else it is a turn."""
    turns = [message for message in messages[max(0, at - 1) : at + 1] if message["role"] == "assistant"]
    if not turns:
        turns.append({"role": "assistant", "content": ""})
        messages.insert(at, turns[0])
    before = turns[-1].get("reasoning_content")
    turns[-1]["reasoning_content"] = f"{before}\n{thought}" if before else thought


def _texts(content: Any, where: str) -> list[str]:
    """The texts of a list of parts."""
    if not isinstance(content, list):
        raise RequestError(f"{where} must be text or a list of parts, got {type(content).__name__}.", param="input")
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if kind not in (*_TEXT_PARTS, "refusal") or not isinstance(text, str):
            raise RequestError(f"{where}[{number}] must be a part with text, got type {kind!r:.100}.", param="input")
        texts.append(text)
    return texts


def _text(content: Any, where: str) -> str:
    return content if isinstance(content, str) else "".join(_texts(content, where))


def _call(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    function = {"name": _named(item, "name", where), "arguments": item.get("arguments") or "{}"}
    return {"id": _named(item, "call_id", where), "type": "function", "function": function}


def _named(item: Mapping[str, Any], key: str, where: str) -> str:
    value = item.get(key)
    if not isinstance(value, str) or not value:
        raise RequestError(f"{where}.{key} must be a text that is not empty.", param="input")
    return value


def _tool(tool: Any, where: str) -> dict[str, Any]:
    """A tool in the form of the chat endpoint, which checks it further."""
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind != "function":
        raise RequestError(
            f"{where} must be of type 'function', got {kind!r:.100}: the server runs no tools.", param="tools"
        )
    function = {key: tool[key] for key in ("name", "description", "parameters", "strict") if tool.get(key) is not None}
    return {"type": "function", "function": function}


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _response_format(form: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if form is None or form.get("type") != "json_schema":
        return None if form is None else dict(form)
    return {"type": "json_schema", "json_schema": {key: value for key, value in form.items() if key != "type"}}
