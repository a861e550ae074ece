"""The thread that owns MLX: it loads models, reads prompts and decodes answers."""

import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition, Thread

from internvl3_mlx.serving.event_stream import Outbox
from internvl3_mlx.serving.queued_request import QueuedRequest
from internvl3_mlx.serving.requests import EngineStopped
from internvl3_mlx.serving.scheduler import Scheduler
from internvl3_mlx.serving.served_model import LoadedParts

STOPPING = "the server is stopping; ask again when it has started"
LONGEST_SLEEP_S = 60.0


@dataclass(frozen=True, eq=False)
class ModelCommand:
    """Load a model, or put it away; ``done`` gets what came of it."""

    model: str
    load: bool
    done: "Future[LoadedParts | None]" = field(default_factory=Future)


@dataclass(eq=False)
class Worker:
    """Runs a scheduler in a thread of its own.

    inbox, commands and stop_at are guarded by ``wakeup``. stop_at: when running answers are cut
    off, on the monotonic clock; None until the engine stops.
    """

    scheduler: Scheduler
    outbox: Outbox
    wakeup: Condition = field(default_factory=Condition)
    inbox: deque[QueuedRequest] = field(default_factory=deque[QueuedRequest])
    commands: deque[ModelCommand] = field(default_factory=deque[ModelCommand])
    stop_at: float | None = None
    stopped: bool = False

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
        while not self.stopped:
            try:
                self.take_inbox()
                self.run_commands()
                scheduler.work()
                scheduler.pool.put_away_idle()
                if self.stop_at is not None:
                    self.wind_down(self.stop_at)
            except Exception as error:  # noqa: BLE001
                scheduler.fail_all(error)
            self.outbox.flush()
        scheduler.memory.close()
        for served in scheduler.pool.loaded:
            scheduler.pool.unload(served)

    def take_inbox(self) -> None:
        """Wait until there is work, and take in what has come."""
        with self.wakeup:
            if not self.scheduler.is_busy:
                longest = self.scheduler.pool.seconds_to_idle(LONGEST_SLEEP_S)
                self.wakeup.wait_for(self.has_news, longest)
            while self.inbox:
                self.scheduler.queue.add(self.inbox.popleft())

    def has_news(self) -> bool:
        return bool(self.inbox or self.commands or self.stop_at is not None)

    def run_commands(self) -> None:
        """Load models and put them away; what has to wait for answers to end stays."""
        with self.wakeup:
            commands, self.commands = self.commands, deque()
        waiting = [command for command in commands if not self.run_command(command)]
        with self.wakeup:
            self.commands.extend(waiting)

    def run_command(self, command: ModelCommand) -> bool:
        """Run a command; return False where it has to wait."""
        pool = self.scheduler.pool
        served = pool.models[command.model]
        if self.stop_at is not None:
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

    def wind_down(self, stop_at: float) -> None:
        """Refuse what has not begun; let answers end, or cut them off when their time is over."""
        scheduler = self.scheduler
        for queued in [*scheduler.queue]:
            scheduler.queue.discard(queued)
            queued.fail(EngineStopped(STOPPING))
        if time.monotonic() >= stop_at:
            scheduler.cut_off()
            scheduler.fail_all(EngineStopped(STOPPING))
        self.stopped = not scheduler.live
