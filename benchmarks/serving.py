"""Many clients that stream from a running server at once: what they got, and what was left behind.

    hybrid serve tiny --queue 1000 & python benchmarks/serving.py --clients 200 --seconds 120

Each client asks again as soon as it has its text; one in ten hangs up early. Printed are texts, failures, tokens a
second, the time to the first token and between tokens, and whether the server's slots are free at the end.
"""

import argparse
import asyncio
import random
import statistics
import time

import httpx


async def client(number: int, http: httpx.AsyncClient, until: float, seen: dict[str, list[float]]) -> None:
    chance = random.Random(number)
    while time.monotonic() < until:
        body = {"prompt": "def " * chance.randint(1, 40), "max_tokens": chance.randint(5, 60), "stream": True}
        leaves, started, last = chance.random() < 0.1, time.monotonic(), 0.0
        try:
            async with http.stream("POST", "/v1/completions", json={**body, "seed": number}) as answer:
                if answer.status_code != 200:
                    seen["failed"].append(answer.status_code)
                    continue
                async for line in answer.aiter_lines():
                    if line == "data: [DONE]":
                        seen["finished"].append(1)
                    elif line.startswith("data: "):
                        now = time.monotonic()
                        seen["next" if last else "first"].append(now - (last or started))
                        last = now
                        if leaves:
                            seen["left"].append(1)
                            break
        except httpx.HTTPError as error:
            print(f"client {number}: {error!r}")
            seen["failed"].append(0)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120)
    given = parser.parse_args()
    seen: dict[str, list[float]] = {name: [] for name in ("finished", "left", "failed", "first", "next")}
    limits = httpx.Limits(max_connections=given.clients)
    async with httpx.AsyncClient(base_url=given.url, timeout=120, limits=limits) as http:
        started = time.monotonic()
        await asyncio.gather(*(client(i, http, started + given.seconds, seen) for i in range(given.clients)))
        took = time.monotonic() - started
        await asyncio.sleep(2)
        metrics = (await http.get("/metrics")).text
    print(f"{given.clients} clients, {took:.0f} s: {len(seen['finished'])} texts, {len(seen['left'])} left early")
    print(f"failed: {len(seen['failed'])}; events/s: {(len(seen['first']) + len(seen['next'])) / took:,.0f}")
    for name in ("first", "next"):
        cuts = statistics.quantiles(seen[name], n=100)
        print(f"{name} token: p50 {cuts[49] * 1e3:,.0f} ms, p99 {cuts[98] * 1e3:,.0f} ms")
    print(*(line for line in metrics.splitlines() if line.startswith(("hybrid_running", "hybrid_waiting"))))


if __name__ == "__main__":
    asyncio.run(main())
