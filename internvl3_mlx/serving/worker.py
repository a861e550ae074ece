"""The thread that owns MLX: it loads models, reads prompts and decodes answers."""

import time
from collections import deque
from dataclasses import dataclass, field
from threading import Condition, Thread

from internvl3_mlx.serving.event_stream import Outbox
from internvl3_mlx.serving.queued_request import QueuedRequest
from internvl3_mlx.serving.requests import EngineStopped
from internvl3_mlx.serving.rounds import ModelCommand, Round, RoundLeader
from internvl3_mlx.serving.scheduler import Scheduler

STOPPING = "the server is stopping; ask again when it has started"
LONGEST_SLEEP_S = 60.0


@dataclass(eq=False)
class Worker:
    """Runs a scheduler in a thread of its own.

    inbox, commands and stop_at are guarded by ``wakeup``. stop_at: when running answers are cut
    off, on the monotonic clock; None until the engine stops. waiting: commands that have to wait
    for answers to end. leader: tells the other ranks, if there are any, of each round.
    """

    scheduler: Scheduler
    outbox: Outbox
    wakeup: Condition = field(default_factory=Condition)
    inbox: deque[QueuedRequest] = field(default_factory=deque[QueuedRequest])
    commands: deque[ModelCommand] = field(default_factory=deque[ModelCommand])
    stop_at: float | None = None
    stopped: bool = False
    waiting: list[ModelCommand] = field(default_factory=list[ModelCommand])
    leader: RoundLeader | None = None

    def __post_init__(self) -> None:
        self.thread = Thread(target=self.run, name="internvl3-engine", daemon=True)

    def notify(self) -> None:
        """Wake the worker, from any thread."""
        with self.wakeup:
            self.wakeup.notify()

    def submit(self, queued: QueuedRequest) -> None:
        """Hand over a request, from any thread."""
        with self.wakeup:
            self.check_open()
            self.inbox.append(queued)
            self.wakeup.notify()

    def command(self, command: ModelCommand) -> None:
        """Hand over a command, from any thread."""
        with self.wakeup:
            self.check_open()
            self.commands.append(command)
            self.wakeup.notify()

    def check_open(self) -> None:
        if self.stop_at is not None or self.stopped:
            raise EngineStopped(STOPPING)

    def stop(self, grace: float) -> None:
        """End running answers within ``grace`` seconds, and the thread; blocks until then."""
        with self.wakeup:
            self.stop_at = time.monotonic() + grace
            self.wakeup.notify()
        if self.thread.is_alive():
            self.thread.join()

    def run(self) -> None:
        """Work until the engine stops. No fault of a request ends this loop."""
        scheduler = self.scheduler
        if self.leader is not None:
            self.leader.start(scheduler.settings)
        while not self.stopped:
            try:
                self.play(self.begin_round())
            except Exception as error:  # noqa: BLE001
                if self.leader is not None:
                    self.leader.end(error)
                scheduler.fail_all(error)
            self.outbox.flush()
        scheduler.memory.close()
        for served in scheduler.pool.loaded:
            scheduler.pool.unload(served)

    def begin_round(self) -> Round:
        """Wait until there is work; return what has come, who has left and what the clock says."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        with self.wakeup:
            if not scheduler.is_busy:
                self.wakeup.wait_for(self.has_news, pool.seconds_to_idle(LONGEST_SLEEP_S))
            added, commands = [*self.inbox], [*self.commands]
            self.inbox.clear()
            self.commands.clear()
            stop_at = self.stop_at
        known = [*scheduler.queue, *scheduler.live, *added]
        left = [one for one in known if one.channel.closed and not one.left]
        stopping = stop_at is not None
        cut = stop_at is not None and time.monotonic() >= stop_at
        begun = Round(added, left, commands, pool.find_idle(), stopping, cut)
        if self.leader is not None:
            self.leader.begin(begun)
        return begun

    def play(self, begun: Round) -> None:
        """Do one round; on all ranks the same."""
        scheduler = self.scheduler
        for queued in begun.added:
            scheduler.queue.add(queued)
        for queued in begun.left:
            queued.left = True
        for name in begun.idle:
            scheduler.pool.unload(scheduler.pool.models[name])
        waiting = [*self.waiting, *begun.commands]
        self.waiting = [one for one in waiting if not self.run_command(one, begun.stopping)]
        scheduler.work()
        if begun.stopping:
            self.wind_down(cut=begun.cut)

    def has_news(self) -> bool:
        return bool(self.inbox or self.commands or self.stop_at is not None)

    def run_command(self, command: ModelCommand, stopping: bool) -> bool:
        """Load a model or put it away; return False where that has to wait for answers to end."""
        pool = self.scheduler.pool
        served = pool.models[command.model]
        if stopping:
            if command.done.set_running_or_notify_cancel():
                command.done.set_exception(EngineStopped(STOPPING))
            return True
        if served.is_busy if not command.load else not pool.make_room(served):
            return False
        if not command.done.set_running_or_notify_cancel():
            return True  # whoever asked has left
        try:
            if not command.load:
                pool.unload(served)
            command.done.set_result(pool.load(served) if command.load else None)
        except Exception as error:  # noqa: BLE001
            command.done.set_exception(error)
        return True

    def wind_down(self, *, cut: bool) -> None:
        """Refuse what has not begun; let answers end, or cut them off when their time is over."""
        scheduler = self.scheduler
        for queued in [*scheduler.queue]:
            scheduler.queue.discard(queued)
            queued.fail(EngineStopped(STOPPING))
        if cut:
            scheduler.cut_off()
            scheduler.fail_all(EngineStopped(STOPPING))
        self.stopped = not scheduler.live
