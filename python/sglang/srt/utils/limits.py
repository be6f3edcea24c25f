"""Every fixed limit on what a client, or a checkpoint, may ask of the server. ``/server_info`` shows them.

Units stand in the names; without one, a limit counts things. Limits that an operator may have to change are flags
(``arg_groups/http.py``).
"""

from __future__ import annotations

# Waiting requests over HTTP, if --max-queued-requests is not given.
MAX_QUEUED_REQUESTS = 2048

# Longest Retry-After of a full queue, in seconds.
MAX_RETRY_AFTER_S = 60

# Total bytes of the bodies of all unfinished requests; at least --max-request-bytes.
MAX_BODY_BYTES_IN_FLIGHT = 512 << 20
# Bytes of a body that is refused unread and that a connection is kept for; with a longer one it closes.
MAX_DRAINED_BODY_BYTES = 65536
# Seconds for which the rest of a refused body is read and discarded, so that the client can read the refusal.
LINGER_S = 5
# Seconds for the headers of a request, from their first byte.
HEADER_TIMEOUT_S = 15
# Seconds for a body, in addition to the time that its size takes at the minimum rate.
BODY_TIMEOUT_S = 30
# Minimum rate at which a body must arrive, in bytes per second.
MIN_BODY_BYTES_PER_S = 16384
# Seconds within which a client must read some of the output that waits for it.
WRITE_TIMEOUT_S = 60
# Seconds in which a client that has closed its sending side, as one that is gone has, may still be answered.
HALF_CLOSED_S = 0.5
# Connections past --max-connections that get a 503; further ones are closed.
MAX_REFUSED_CONNECTIONS = 64
# File descriptors reserved for everything but connections.
SPARE_DESCRIPTORS = 32

# Long texts that are tokenized at once; others wait. Each may take some 130 bytes per token for a moment.
MAX_LONG_TEXTS_AT_ONCE = 4
# Seconds for requests in flight to finish after Ctrl-C (after SIGTERM: --drain-timeout).
DRAIN_INTERRUPT_S = 5.0
# Seconds for clients to read the error of requests that the shutdown ends.
DRAIN_WRITE_S = 3
# Retry-After, in seconds, of a request that an ending server refuses; another server, or the next one, may accept it.
SHUTDOWN_RETRY_AFTER_S = 5

# Prompts times samples of one HTTP call, even if the queue is longer.
MAX_REQUESTS_PER_CALL = 8192
MAX_RID_CHARS = 256
MAX_STOP_STRINGS = 32
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_CHARS = 8192
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS_ENTRIES = 1024
# Named ids, without duplicates, whose log-probabilities come with each token.
MAX_TOKEN_IDS_LOGPROB = 1024
# Most `top_logprobs` per token: for OpenAI's chat endpoint, and for all others.
MAX_CHAT_TOP_LOGPROBS = 20
MAX_TOP_LOGPROBS = 128
# Log-probabilities of one prompt, best and named ones included.
MAX_PROMPT_LOGPROBS = 1 << 17
# The same of all prompts of one call.
MAX_PROMPT_LOGPROBS_PER_CALL = 1 << 19
# Grammars (json_schema, regex, ebnf, structural_tag): length, limits of compiling one, and results that are remembered.
MAX_GRAMMAR_CHARS = 1 << 18
MAX_GRAMMAR_CPU_S = 2.0
MAX_GRAMMAR_BYTES = 1 << 30
MAX_GRAMMARS_CACHED = 64
MAX_TOKENIZE_TEXTS = 4096
MAX_DETOKENIZE_IDS = 1 << 18

# Unknown fields of request bodies: how much of a name is kept, how many are logged, how many one answer lists.
MAX_UNKNOWN_FIELD_CHARS = 64
MAX_UNKNOWN_FIELDS_LOGGED = 256
MAX_WARNINGS = 16

# JSON and template files of a checkpoint (tokenizer.json apart): bytes of a file, objects and lists within each other.
MAX_CHECKPOINT_JSON_BYTES = 33_554_432
MAX_CHECKPOINT_JSON_DEPTH = 64
MAX_TOKENIZER_JSON_BYTES = 268_435_456
# Most characters that a tokenizer's rules may produce from one character, and from one token when decoding.
MAX_TOKENIZER_GROWTH = 4096
# Sizes in config.json: layers, tokens of the vocabulary, positions, widths and counts of any other kind, real numbers.
MAX_CONFIG_LAYERS = 1024
MAX_CONFIG_VOCAB = 1 << 24
MAX_CONFIG_POSITIONS = 1 << 30
MAX_CONFIG_SIZE = 1 << 18
MAX_CONFIG_REAL = 1e15
# Chat templates. All text that a rendering creates counts, including copies and joins, not only the prompt.
MAX_CHAT_TEMPLATE_CHARS = 262_144
MAX_TEMPLATE_STEPS = 2_000_000
MAX_TEMPLATE_TEXT_CHARS = 67_108_864
MAX_TEMPLATE_CPU_S = 5.0


def shown() -> dict[str, float]:
    """All limits by name, in lower case."""
    return {name.lower(): value for name, value in globals().items() if name.isupper()}
