"""Talk to a server: a chat, a stream, an urgent request during a long one, embeddings.

    pip install 'fpcompile[serve]' openai
    fpcompile serve --random-weights tiny
    python examples/serve_client.py [--base-url http://127.0.0.1:8000] [--model tiny] [--embedder tiny-embed]

Nothing of the client is special to fpcompile but two fields: how soon the first token is wanted, and how soon
every other one. With the tiny model's random weights the text means nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import time

from openai import AsyncOpenAI


async def streamed(client: AsyncOpenAI, model: str, prompt: str, ttft_slo: float) -> tuple[float, int]:
    """(seconds to the first token, tokens) of one streamed completion."""
    begun = time.monotonic()
    first, tokens = 0.0, 0
    stream = await client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=16,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ttft_slo": ttft_slo, "tbt_slo": 0.2},
    )
    async for chunk in stream:
        first = first or time.monotonic() - begun
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
    return first, tokens


async def main() -> None:
    """Every kind of request once."""
    options = argparse.ArgumentParser()
    options.add_argument("--base-url", default="http://127.0.0.1:8000")
    options.add_argument("--model", default="tiny")
    options.add_argument("--embedder", default="tiny-embed")
    options.add_argument("--api-key", default="none")
    given = options.parse_args()
    async with AsyncOpenAI(base_url=f"{given.base_url}/v1", api_key=given.api_key) as client:
        chat = await client.chat.completions.create(
            model=given.model, messages=[{"role": "user", "content": "Hello"}], max_tokens=16, temperature=0
        )
        assert chat.usage is not None
        print(f"chat: {chat.choices[0].message.content!r}, {chat.usage.completion_tokens} tokens")

        long = asyncio.create_task(streamed(client, given.model, "a long report " * 270, 30.0))
        await asyncio.sleep(0.05)
        first, tokens = await streamed(client, given.model, "quick", 0.25)
        print(f"urgent: first token after {first * 1e3:.0f} ms, {tokens} tokens")
        first, tokens = await long
        print(f"long: first token after {first * 1e3:.0f} ms, {tokens} tokens")

        vectors = await client.embeddings.create(model=given.embedder, input=["one text", "another text"])
        one, other = (item.embedding for item in vectors.data)
        cosine = sum(a * b for a, b in zip(one, other, strict=True))
        print(f"embeddings: {len(one)} numbers, cosine {cosine:.3f}")


if __name__ == "__main__":
    asyncio.run(main())
