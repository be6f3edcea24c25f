"""``/v1/models``."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import Response

from sglang.srt.entrypoints.context import ServerContext
from sglang.srt.entrypoints.endpoint import Endpoint
from sglang.srt.entrypoints.errors import json_response
from sglang.srt.entrypoints.openai.protocol import ModelCard, ModelList


class ModelsApi:
    """The one model that is served, as a list and as a card."""

    def __init__(self, context: ServerContext):
        self._context = context
        name = context.served_model_name
        self._card = ModelCard(name, name, context.model_config.context_len, int(time.time()))

    def endpoints(self) -> list[Endpoint]:
        tag = "OpenAI"
        return [
            Endpoint("/v1/models", ("GET",), self.list_models, tag, "The model that is served.", result=ModelList),
            Endpoint("/v1/models/{model:path}", ("GET",), self.show_model, tag, "One model.", result=ModelCard),
        ]

    async def list_models(self, _: Request) -> Response:
        return json_response(ModelList([self._card]))

    async def show_model(self, request: Request) -> Response:
        self._context.check_model(request.path_params["model"])
        return json_response(self._card)
