"""A running answer ends as soon as it is canceled, whenever that is."""

import asyncio

from fixtures.fake_engine import FakeEngine
from fixtures.serving import question

from internvl3_mlx.serving.answers import RunningAnswer
from internvl3_mlx.serving.request_log import RequestNote

LONG = ("x",) * 1000
PROMPTLY_S = 5  # half of what the answer takes
TURNS = 12  # of the event loop, within which the first event comes


async def leave(turns: int) -> bool:
    """Cancel an answer after some turns of the event loop; return whether it had an event."""
    stream = await FakeEngine(pieces=LONG, pause_s=0.01).submit(question("What?"))
    running = RunningAnswer(stream, timeout=60, note=RequestNote())
    answer = asyncio.ensure_future(running.finish())
    for _ in range(turns):
        await asyncio.sleep(0)
    answer.cancel()
    done, _ = await asyncio.wait({answer}, timeout=PROMPTLY_S)
    assert done, f"canceled after {turns} turns, the answer goes on"
    assert answer.cancelled()
    assert stream.closed
    assert not stream.finished
    return running.usage.prompt_tokens > 0


def test_an_answer_ends_when_it_is_canceled_just_as_an_event_comes():
    had_events = [asyncio.run(leave(turns)) for turns in range(1, TURNS)]
    assert {*had_events} == {False, True}
