"""A good body for each route that takes one, to be made worse by tests over all of them."""

from __future__ import annotations

from typing import Any

MESSAGES = [{"role": "user", "content": "hi"}]
# A body that each route answers.
BODIES: dict[str, dict[str, Any]] = {
    "/generate": {"text": "hi", "sampling_params": {"max_new_tokens": 1}},
    "/v1/completions": {"prompt": "hi", "max_tokens": 1},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 1},
    "/v1/responses": {"input": "hi", "max_output_tokens": 1},
    "/v1/messages": {"model": "fake", "messages": MESSAGES, "max_tokens": 1},
    "/v1/messages/count_tokens": {"model": "fake", "messages": MESSAGES},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [104]},
    "/abort_request": {"rid": "none"},
}
# Routes that need more of a server than tests.api.in_process has: what they refuse comes first.
MORE: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": "hi"},
    "/v1/score": {"prompt": "hi", "continuations": ["a"]},
    "/cache/explain": {"prompt": "hi"},
    "/pause_generation": {},
    "/continue_generation": {},
}
