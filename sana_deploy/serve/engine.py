"""What the API asks of an engine: pictures for an order, within a queue and a deadline, and one way for each failure.

An order is the content of one request of a client: pictures that share their settings. An engine draws orders on
replicas. Every accepted order ends in its pictures or in one of the errors here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from .._models import Diagnostic
from ..declare.workload import Workload
from ..errors import SanaDeployError

if TYPE_CHECKING:
    from PIL.Image import Image


class EngineError(SanaDeployError):
    """An order that the engine did not draw; the service goes on."""


class QueueFullError(EngineError):
    """There is no place for the order; `seconds` until there may be one."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class NotServingError(EngineError):
    """The engine is still loading, is draining, or has no replica left."""


class TooLateError(EngineError):
    """The order was not done within its time."""


class StoppedError(Exception):
    """Nobody waits for what is drawn: raised in a replica's thread to end it."""


@dataclass(frozen=True)
class Settings:
    """What pictures that are drawn together share. Sides are pixels."""

    height: int
    width: int
    steps: int
    guidance_scale: float
    conditioning_scale: float
    strength: float = 1.0
    pag_scale: float = 3.0

    def workload(self, batch: int = 1) -> Workload:
        """The shape of `batch` pictures."""
        size = {"height": self.height, "width": self.width}
        guided = self.guidance_scale > 1
        return Workload(**size, batch=batch, steps=self.steps, guided=guided, strength=self.strength)


@dataclass(frozen=True)
class Content:
    """What one picture is of: its texts and seed, and an RGB image of the order's height and width, or none."""

    prompt: str
    negative_prompt: str
    seed: int
    control_image: Image | None


@dataclass(frozen=True)
class Order:
    """Pictures of one request.

    Attributes:
        name: the request's id, for logs.
        settings: what its pictures share.
        contents: one for each picture, in the order of the answer.
        batch: pictures of these settings that are best drawn at once, of this order or of several.
        previews: unfinished pictures of each that the client wants to see.
    """

    name: str
    settings: Settings
    contents: Sequence[Content]
    batch: int = 1
    previews: int = 0


@dataclass(frozen=True)
class Drawn:
    """A finished picture; seconds that it waited and that its batch took by phase, and who shared the batch."""

    picture: Image
    waited: float
    seconds: Mapping[str, float]
    batch: int
    remarks: Sequence[Diagnostic] = ()


@dataclass(frozen=True)
class Progress:
    """A step of a picture has been done: its number in the order, the steps done and in all, perhaps a preview."""

    number: int
    done: int
    steps: int
    preview: Image | None = None


OnProgress = Callable[[Progress], None]
"""Called in the loop that asked for the order."""


@dataclass(frozen=True)
class Made:
    """What a replica made of one batch."""

    pictures: Sequence[Image]
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: Mapping[str, int] = field(default_factory=dict)
    remarks: Sequence[Sequence[Diagnostic]] = ()


Preview = Callable[[], "Sequence[Image] | None"]
"""Makes pictures of what a batch looks like so far; None where that cannot be seen."""


class OnStep(Protocol):
    """What a replica tells of a drawing."""

    @property
    def shown(self) -> Collection[int]:
        """The steps after which `preview` may be called."""
        ...

    def __call__(self, done: int, of: int, preview: Preview) -> None:
        """Say after every step how many are done; raises `StoppedError` to end the drawing."""

    def check(self) -> None:
        """Raise `StoppedError` where nobody waits any more; for replicas that hear of steps from elsewhere."""


class Observer:
    """Is told what an engine does; called from any thread. This one does nothing with it."""

    def began(self, waited: Sequence[float]) -> None:
        """Pictures of a batch are drawn now, after waiting so many seconds each."""

    def made(self, made: Made) -> None:
        """A batch is done."""

    def cancelled(self, pictures: int) -> None:
        """So many pictures were asked for by a client that left before they were done."""

    def retried(self, pictures: int) -> None:
        """So many pictures are drawn again: their batch failed, or their replica was lost."""


class Replica(Protocol):
    """A placed pipeline, used by one thread at a time, or by as many as it says in `at_once` when it is loaded."""

    def load(self) -> None:
        """Make it ready to draw.

        Raises:
            SanaDeployError: it cannot be.
        """

    def draw(self, settings: Settings, contents: Sequence[Content], on_step: OnStep) -> Made:
        """Draw one batch.

        Raises:
            SanaDeployError: it failed; the replica may be used again if `recover` says so.
            StoppedError: from `on_step`.
        """
        ...

    def recover(self) -> bool:
        """Give back what a failed drawing left; whether the replica can go on."""
        ...


def at_once(replica: Replica) -> int:
    """Batches that a loaded replica draws at once, each in a thread of its own."""
    return getattr(replica, "at_once", 1)


@dataclass(frozen=True)
class Standing:
    """How an engine stands: replicas that are ready and in all, pictures waiting and at work."""

    ready: int
    replicas: int
    waiting: int
    working: int
    draining: bool = False


class Engine(Protocol):
    """Draws orders."""

    @property
    def standing(self) -> Standing:
        """How it stands now."""
        ...

    async def start(self) -> None:
        """Load every replica.

        Raises:
            SanaDeployError: one of them cannot be loaded.
        """

    async def draw(self, order: Order, on_progress: OnProgress | None = None) -> Sequence[Drawn]:
        """Draw an order. Cancelling the call takes its pictures out of the queue, and ends them within a step.

        Raises:
            QueueFullError: at once, where there is no place.
            NotServingError: it is loading or draining, or the last replica was lost.
            TooLateError: its time is over.
            SanaDeployError: the drawing failed.
        """
        ...

    def admit(self, pictures: int) -> None:
        """Say now whether an order of so many pictures would be taken; raises as `draw` does."""

    async def drain(self, seconds: float) -> bool:
        """Take no more orders and finish those accepted; those left after `seconds` fail. Whether all were finished."""
        ...

    async def close(self) -> None:
        """End the replicas; orders that are left fail."""

    async def lost(self) -> SanaDeployError:
        """Return once no replica is left, with the reason."""
        ...
