"""Turns token ids into text deltas that hold neither half a character nor any part of a stop string."""

from __future__ import annotations

import codecs
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from sglang.srt.managers.io_struct import (
    BatchStrOutput,
    BatchTokenIDOutput,
    DetokenizerMessage,
    FinishReason,
    RequestOutput,
    ShutdownReq,
    StrOutput,
    TokenIDOutput,
)
from sglang.srt.managers.ipc import IDLE_WAKE_S, IpcNames, Receiver, Sender
from sglang.srt.utils.hf_tokenizer import Tokenizer

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

_REPLACEMENT = "\ufffd"
# A character has at most 4 bytes, so at most 3 trailing replacement characters can still become a real character.
_MAX_UNSTABLE = 3
_WINDOW_KEEP = 6
_WINDOW_MAX = 16
# After this many tokens without a stable end, text is sent unchanged.
_WINDOW_LIMIT = 64


class ByteTextStream:
    """Byte-level tokenizers: text is the UTF-8 decoding of the tokens' bytes, so one decoder state is enough."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool):
        self._bytes_of = tokenizer.token_bytes
        self._skipped = tokenizer.all_special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: list[int], final: bool) -> str:
        data = b"".join([self._bytes_of(i) for i in ids if i not in self._skipped])
        return self._utf8.decode(data, final)


class WindowTextStream:
    """Any other tokenizer: decode a short window of recent tokens and return the text after the part already sent.

    The window's first tokens are context only (a word boundary is invisible to a token decoded alone). Trailing
    replacement characters are held back, because they may be the start of a character.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool):
        self._decode = tokenizer.decode
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []
        self._text = ""
        self._sent = ""

    def push(self, ids: list[int], final: bool) -> str:
        delta = "".join([self._push_one(token_id) for token_id in ids])
        return delta + self._text[len(self._sent) :] if final else delta

    def _push_one(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._text = self._decode(self._window, self._skip_special_tokens)
        overfull = len(self._window) >= _WINDOW_LIMIT
        if overfull:
            stable = text
        elif text.startswith(self._sent):
            stable = _without_unstable_end(text)
        else:
            # A byte-fallback decoder rewrites its whole run of bytes while the last character is incomplete.
            return ""
        delta = stable[len(self._sent) :]
        self._sent = text[: len(self._sent) + len(delta)]
        if len(self._window) > _WINDOW_MAX:
            self._shrink(overfull)
        return delta

    def _shrink(self, overfull: bool) -> None:
        """Drop old tokens where that changes neither the end of the text nor what is held back."""
        unsent = len(self._text) - len(self._sent)
        for cut in range(len(self._window) - _WINDOW_KEEP, len(self._window) - 1):
            kept = self._decode(self._window[cut:], self._skip_special_tokens)
            if len(kept) > unsent and self._text.endswith(kept):
                self._window = self._window[cut:]
                self._text, self._sent = kept, kept[: len(kept) - unsent]
                return
        if overfull:
            self._window = self._window[-_WINDOW_KEEP:]
            self._text = self._sent = self._decode(self._window, self._skip_special_tokens)


def _without_unstable_end(text: str) -> str:
    end = len(text)
    while end > 0 and len(text) - end < _MAX_UNSTABLE and text[end - 1] == _REPLACEMENT:
        end -= 1
    return text[:end]


class StopTrimmer:
    """Holds back text that may be the start of a stop string, and cuts the text at the stop that ended the request.

    The scheduler decides what ends a request. A complete stop string that did not end the request within one more token
    (``min_new_tokens`` forbids it) is ordinary text and is released. Fed token by token, it sends the same text however
    tokens are grouped into messages.
    """

    def __init__(self, stops: list[str]):
        self._stops = stops
        self._held = ""
        # Stop strings that begin before this position of the held text did not end the request.
        self._passed = 0

    def push(self, delta: str) -> str:
        """Text that is now safe to send."""
        text = self._held + delta
        stop = self._first_stop(text, self._passed)
        safe = self._first_partial(text)
        if stop is not None:
            safe, self._passed = min(safe, stop), stop + 1
        self._passed = max(0, self._passed - safe)
        self._held = text[safe:]
        return text[:safe]

    def finish(self, delta: str, matched: bool) -> str:
        """The rest of the text, cut at the first stop string that ``delta`` completes if one ended the request."""
        text = self._held + delta
        if not matched:
            return text
        cuts = [text.find(stop, max(0, len(self._held) - len(stop) + 1)) for stop in self._stops]
        cut = min((position for position in cuts if position >= 0), default=self._first_stop(text, 0))
        return text[:cut]

    def _first_stop(self, text: str, start: int) -> int | None:
        found = [p for p in (text.find(stop, start) for stop in self._stops) if p >= 0]
        return min(found, default=None)

    def _first_partial(self, text: str) -> int:
        """Start of the longest end of ``text`` that begins some stop string."""
        first = len(text)
        for stop in self._stops:
            for position in range(max(0, len(text) - len(stop) + 1), first):
                if stop.startswith(text[position:]):
                    first = position
                    break
        return first


class RequestText:
    """Decoding state of one request."""

    def __init__(self, output: TokenIDOutput, tokenizer: Tokenizer):
        kind: type[ByteTextStream] | type[WindowTextStream]
        kind = ByteTextStream if tokenizer.is_byte_level else WindowTextStream
        self._stream = kind(tokenizer, output.skip_special_tokens)
        self._trimmer = StopTrimmer(output.stop) if output.stop and not output.no_stop_trim else None

    def push(self, output: TokenIDOutput) -> str:
        reason = output.finish_reason
        ids = output.output_ids
        stopped = reason is not None and reason.type == "stop"
        if reason is not None and stopped and not output.no_stop_trim and ids and ids[-1] == reason.matched:
            ids = ids[:-1]
        if self._trimmer is None:
            return self._stream.push(ids, final=reason is not None)
        before = ids if reason is None else ids[:-1]
        text = "".join([self._trimmer.push(self._stream.push([token_id], final=False)) for token_id in before])
        if reason is None:
            return text
        last = self._stream.push(ids[-1:], final=True)
        return text + self._trimmer.finish(last, matched=stopped and isinstance(reason.matched, str))


class DetokenizerManager:
    """The detokenizer process: one inbox of ids from the scheduler, one outbox of text to the tokenizer manager.

    With ``--skip-tokenizer-init`` it passes the ids on with empty text. State of a request ends with its finish
    reason, aborts included.
    """

    def __init__(self, server_args: ServerArgs, ipc: IpcNames):
        self.tokenizer: Tokenizer | None = None
        if not server_args.skip_tokenizer_init:
            self.tokenizer = Tokenizer.from_path(
                server_args.tokenizer_path or server_args.model_path, with_template=False
            )
        self._receiver: Receiver[DetokenizerMessage] = Receiver(ipc.detokenizer, DetokenizerMessage)
        self._sender = Sender(ipc.tokenizer)
        self._requests: dict[str, RequestText] = {}

    def event_loop(self, on_turn: Callable[[], None] = lambda: None) -> None:
        """Serve until a ShutdownReq arrives; ``on_turn`` is called with each message, and each second without one."""
        while True:
            message = self._receiver.recv(IDLE_WAKE_S)
            on_turn()
            if message is None:
                continue
            if isinstance(message, ShutdownReq):
                return
            self._sender.send(self.handle(message))

    def close(self) -> None:
        self._receiver.close()
        self._sender.close()

    def handle(self, batch: BatchTokenIDOutput) -> BatchStrOutput:
        """Text deltas of one scheduler step."""
        return BatchStrOutput(outputs=[self._handle_one(output) for output in batch.outputs])

    def _handle_one(self, output: TokenIDOutput) -> StrOutput:
        text = ""
        try:
            text = self._text_of(output)
        except Exception as error:  # ends only this request: the others of the message continue
            logger.exception("request %.64r is ended", output.rid)
            words = f"Turning tokens into text failed: {error}."
            output.finish_reason = FinishReason(
                type="abort", message=words, status_code=500, err_type="InternalServerError"
            )
            self._requests.pop(output.rid, None)
        passed_on = {name: getattr(output, name) for name in RequestOutput.__struct_fields__}
        return StrOutput(text=text, **passed_on)

    def _text_of(self, output: TokenIDOutput) -> str:
        if self.tokenizer is None:
            return ""
        state = self._requests.get(output.rid)
        if state is None:
            state = RequestText(output, self.tokenizer)
            if output.finish_reason is None:
                self._requests[output.rid] = state
        elif output.finish_reason is not None:
            del self._requests[output.rid]
        return state.push(output)
