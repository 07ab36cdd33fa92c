"""A job of the bridge: steps for the worker, and the queue of their events."""

from collections.abc import Generator
from dataclasses import dataclass

from magistral_mlx.serving.event_queue import EventQueue
from magistral_mlx.serving.events import failed

Steps = Generator[None, None, None]


@dataclass(slots=True)
class Job:
    """A generator that the worker steps, and the queue of its events; it must end its queue."""

    steps: Steps
    events: EventQueue

    def step(self) -> bool:
        """Take one step and return True if it was the last. Never raises."""
        try:
            for _ in self.steps:
                return False
            self.events.abort()  # no effect on a queue that has ended
        except BaseException as error:
            try:
                self.events.end(failed(error))
            except BaseException:  # no memory for an event either
                self.events.abort()
        return True
