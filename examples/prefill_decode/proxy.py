# SPDX-License-Identifier: Apache-2.0
"""One address before servers that compute prompts and servers that decode.

python proxy.py --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200 --port 8000

A request goes to a prefill server first, which answers with one token, and then to a decode server, whose KV connector takes the prompt's keys and values from
the first. What the connector of the first says about where they are (`kv_transfer_params`) goes with it; a connector that finds them by itself says nothing.
"""

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import cycle
from json import JSONDecodeError
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

# How vLLM's connectors ask a server to keep a prompt's keys and values for another one, which it does not know yet.
KEEP = {
    "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None, "remote_host": None, "remote_port": None,
}  # fmt: skip
OF_ANSWERS = ("stream_options", "min_tokens", "n", "best_of", "use_beam_search")  # of no use in an answer of one token


def for_prefill(body: dict[str, Any]) -> dict[str, Any]:
    """The same request, for one token."""
    asked = {name: value for name, value in body.items() if name not in OF_ANSWERS}
    asked |= {"max_tokens": 1, "stream": False, "kv_transfer_params": KEEP}
    if "max_completion_tokens" in body:
        asked["max_completion_tokens"] = 1
    return asked


def refused(why: str, status: int) -> Response:
    """An error in the form of the API's."""
    return JSONResponse({"error": {"message": why, "code": status}}, status)


async def unreadable(request: Request, error: Exception) -> Response:
    """The request's body is not JSON."""
    return refused(f"the request is not JSON: {error}", 400)


async def unreachable(request: Request, error: Exception) -> Response:
    """A server does not answer."""
    assert isinstance(error, httpx.TransportError)
    return refused(f"no answer from {error.request.url}: {error}", 502)


async def complete(request: Request) -> Response:
    """/v1/completions and /v1/chat/completions."""
    state, body = request.app.state, await request.json()
    if not isinstance(body, dict):
        return refused(f"the request is no JSON object but {type(body).__name__}", 400)
    first = await state.client.post(next(state.prefill) + request.url.path, json=for_prefill(body))
    if first.status_code != httpx.codes.OK:
        return Response(first.content, first.status_code, media_type=first.headers.get("content-type"))
    if found := first.json().get("kv_transfer_params"):
        body["kv_transfer_params"] = found
    asked = state.client.build_request("POST", next(state.decode) + request.url.path, json=body)
    answer = await state.client.send(asked, stream=True)
    return StreamingResponse(
        answer.aiter_bytes(), answer.status_code, media_type=answer.headers.get("content-type"), background=BackgroundTask(answer.aclose)
    )  # fmt: skip


async def models(request: Request) -> Response:
    """/v1/models, as a decode server has it."""
    answer = await request.app.state.client.get(next(request.app.state.decode) + request.url.path)
    return Response(answer.content, answer.status_code, media_type=answer.headers.get("content-type"))


async def health(request: Request) -> Response:
    """Whether this program answers; the servers have a /health of their own."""
    return Response()


def application(prefill: list[str], decode: list[str]) -> Starlette:
    """The program for servers at these addresses, which take requests in turn."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None)) as client:
            app.state.client, app.state.prefill, app.state.decode = client, cycle(prefill), cycle(decode)
            yield

    routes = [Route(f"/v1/{path}", complete, methods=["POST"]) for path in ("completions", "chat/completions")]
    routes += [Route("/v1/models", models), Route("/health", health)]
    return Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={JSONDecodeError: unreadable, httpx.TransportError: unreachable},
    )


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefill", nargs="+", required=True, metavar="URL", help="servers that compute prompts")
    parser.add_argument("--decode", nargs="+", required=True, metavar="URL", help="servers that decode")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    uvicorn.run(application(given.prefill, given.decode), host=given.host, port=given.port)


if __name__ == "__main__":
    main()
