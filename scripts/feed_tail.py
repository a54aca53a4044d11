"""Follow the load of a router's fleet: scripts/feed_tail.py [ws://127.0.0.1:8888/ws/load]."""

import json
import sys

import trio
import trio_websocket

URL = sys.argv[1] if len(sys.argv) > 1 else "ws://127.0.0.1:8888/ws/load"


async def main() -> None:
    async with trio_websocket.open_websocket_url(URL) as feed:
        while True:
            message = json.loads(await feed.get_message())
            if message["type"] == "snapshot":
                loads = [f"{server['name']} {server['load']:.0%}" for server in message["servers"]]
                print(*loads, sep=", ", flush=True)
            elif message["type"] == "event":
                print("*", message["text"], flush=True)


trio.run(main)
