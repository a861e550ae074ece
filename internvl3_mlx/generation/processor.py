"""From a question, images and options to what the model reads: token ids, tiles and positions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Literal, cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from internvl3_mlx.config import ModelConfig
from internvl3_mlx.errors import PromptError, UserError
from internvl3_mlx.generation.generation_config import GenerationConfig, InputVideo, V2PEDelta
from internvl3_mlx.images.fetch import shorten_name
from internvl3_mlx.images.load import ImageSource, LoadedImage, open_image
from internvl3_mlx.images.tiling import TilePolicy, normalize, to_tiles
from internvl3_mlx.prompt.messages import Message, MessageMedia, TextSegment, media_order
from internvl3_mlx.prompt.reasoning import cot_question
from internvl3_mlx.prompt.template import Template
from internvl3_mlx.prompt.tokenizer import Tokenizer
from internvl3_mlx.prompt.v2pe import (
    auto_delta,
    image_spans,
    next_position,
    parse_delta,
    visual_positions,
)

AUTO: Literal["auto"] = "auto"
HASH_BYTES = 16  # 128 bits: no two images share a hash by accident


@dataclass(frozen=True)
class ImageInfo:
    """Where one image or frame came from, its size in pixels, and its tiles and tokens.

    note: what of the file the model does not see, if anything. compressed_tiles: how many of the
    tiles a Flash model reads in the compressed form; None where it was not decided.
    """

    source: str
    width: int
    height: int
    tiles: int
    tokens: int
    note: str | None = None
    compressed_tiles: int | None = None


@dataclass(frozen=True, eq=False)
class ProcessedImage:
    """One tiled image or frame. tiles: RGB (T, S, S, 3) uint8.

    compressed: for each tile whether a Flash model compresses it; empty until that is decided.
    """

    tiles: NDArray[np.uint8]
    info: ImageInfo
    compressed: tuple[bool, ...] = ()

    @cached_property
    def content_hash(self) -> bytes:
        """A hash of the tiles, whatever the file is called."""
        digest = blake2b(str(self.tiles.shape).encode(), digest_size=HASH_BYTES)
        digest.update(np.ascontiguousarray(self.tiles).data)
        return digest.digest()

    @property
    def token_hash(self) -> bytes:
        """A hash of what the visual tokens are made of: the tiles, and which are compressed."""
        if not any(self.compressed):
            return self.content_hash
        return blake2b(self.content_hash + bytes(self.compressed), digest_size=HASH_BYTES).digest()


@dataclass(frozen=True, eq=False)
class ProcessedFrame:
    """One frame of a video, one tile without a thumbnail, and its time in seconds."""

    image: ProcessedImage
    seconds: float


@dataclass(frozen=True, eq=False)
class ProcessedVideo:
    """A video's frames, and their times in seconds where the prompt names them."""

    name: str
    frames: tuple[ProcessedImage, ...]
    times: tuple[float, ...] | None = None

    @property
    def media(self) -> MessageMedia:
        return MessageMedia(tiles=(1,) * len(self.frames), kind="video", times=self.times)


InputImage = ImageSource | ProcessedImage


@dataclass(frozen=True, eq=False)
class ModelInputs:
    """What the model reads.

    processed_images: images and frames in the order of their tokens. positions: (L,) float32.
    deltas: the V2PE position step of each image. message_images: how many images and frames each
    message has, which a Flash model needs; empty for prompts that are built by hand.
    preprocess_s, vision_s: what opening the images took, and encoding some of them meanwhile, with
    a peak of ``vision_nbytes`` of MLX's memory.
    """

    token_ids: list[int]
    processed_images: tuple[ProcessedImage, ...]
    positions: NDArray[np.float32]
    deltas: tuple[float, ...] = ()
    preprocess_s: float = 0.0
    vision_s: float = 0.0
    vision_nbytes: int = 0
    message_images: tuple[int, ...] = ()

    @property
    def is_routed(self) -> bool:
        """Whether it was decided which tiles are compressed."""
        return any(image.compressed for image in self.processed_images)

    @property
    def images(self) -> tuple[ImageInfo, ...]:
        return tuple(image.info for image in self.processed_images)

    @property
    def tiles(self) -> NDArray[np.uint8] | None:
        """RGB of all images, (T, S, S, 3) uint8; None without images."""
        if not self.processed_images:
            return None
        return np.concatenate([image.tiles for image in self.processed_images])

    @property
    def input_ids(self) -> mx.array:
        """(L,) int32."""
        return mx.array(self.token_ids, dtype=mx.int32)

    @property
    def pixel_values(self) -> mx.array | None:
        """(T, S, S, 3) float32, normalized, bit-identical to the published preprocessing."""
        return mx.array(normalize(self.tiles)) if self.tiles is not None else None

    @property
    def position_ids(self) -> mx.array:
        """(L,) float32."""
        return mx.array(self.positions)

    @property
    def num_tiles(self) -> list[int]:
        """Tiles of each image, thumbnails included."""
        return [image.tiles for image in self.images]

    @property
    def image_tokens(self) -> int:
        return sum(image.tokens for image in self.images)

    @property
    def uses_unit_positions(self) -> bool:
        """True when positions are 0, 1, 2 ..., so that the fused rotary kernel applies."""
        return all(delta == 1 for delta in self.deltas)

    @property
    def next_position(self) -> float:
        """The position of the first generated token."""
        return next_position(self.positions)


@dataclass(frozen=True)
class Processor:
    """Turns questions and images into ``ModelInputs`` for one model."""

    config: ModelConfig
    tokenizer: Tokenizer
    template: Template

    def build_question(
        self,
        question: str,
        images: Sequence[ProcessedImage],
        videos: Sequence[ProcessedVideo],
        generation_config: GenerationConfig,
    ) -> ModelInputs:
        """Build the prompt of a question about open media. Images of the history come first."""
        counts = [image.info.tiles for image in images]
        history = [retile_message(message, counts) for message in generation_config.history]
        num_past = len(images) - len(counts)
        message, new = make_user_message(question, images[num_past:], videos)
        return self.build([*history, message], [*images[:num_past], *new], generation_config)

    def process_image(
        self, image: InputImage, generation_config: GenerationConfig
    ) -> ProcessedImage:
        """Open and tile one image; one that was processed before is returned as it is."""
        if isinstance(image, ProcessedImage):
            return image
        loaded = open_image(image, upright=generation_config.upright)
        return self.tile_image(loaded, self.tile_policy(generation_config))

    def process_video(
        self, video: InputVideo, generation_config: GenerationConfig
    ) -> ProcessedVideo:
        """Read the frames of a video; one that was read before is returned as it is."""
        if isinstance(video, ProcessedVideo):
            return video
        return make_video(video, [*self.iter_frames(video, generation_config)], generation_config)

    def iter_frames(
        self, video: InputVideo, generation_config: GenerationConfig
    ) -> Iterator[ProcessedFrame]:
        """Yield the frames of a video, each as soon as it is decoded; each is one tile."""
        from internvl3_mlx.images.video import iter_frames

        source = cast(str | Path | bytes, video)
        frames = iter_frames(
            source, generation_config.num_frames, upright=generation_config.upright
        )
        policy = TilePolicy(tile_size=self.config.force_image_size, max_tiles=1, dynamic=False)
        for frame in frames:
            yield ProcessedFrame(self.tile_image(frame.loaded_image, policy), frame.seconds)

    def build(
        self,
        messages: Sequence[Message],
        images: Sequence[ProcessedImage],
        generation_config: GenerationConfig,
        *,
        continued: str = "",
    ) -> ModelInputs:
        """Build the prompt of some messages. images: what they show, in the prompt's order.

        continued: the beginning of the answer, which the model is to continue.
        """
        if generation_config.cot:
            last = replace(messages[-1], text=cot_question(messages[-1].text))
            messages = [*messages[:-1], last]
        segments = self.template.render(messages, generation_config.system_prompt)
        if continued:
            segments = [*segments, TextSegment(continued, untrusted=True)]
        ids = self.tokenizer.encode(segments, self.config.num_image_token)
        positions, deltas = self.compute_positions(ids, generation_config)
        counts = tuple(sum(medium.num_images for medium in one.media) for one in messages)
        return ModelInputs(ids, tuple(images), positions, deltas, message_images=counts)

    def tile_policy(self, generation_config: GenerationConfig) -> TilePolicy:
        """Combine the options with the checkpoint's defaults; raise UserError if contradictory."""
        model, given = self.config, generation_config
        most = model.max_dynamic_patch if given.max_tiles is None else given.max_tiles
        least = model.min_dynamic_patch if given.min_tiles is None else given.min_tiles
        if least > most:
            raise UserError(
                f"min_tiles {least} is more than max_tiles {most}; lower one or raise the other"
            )
        return TilePolicy(
            tile_size=model.force_image_size,
            min_tiles=least,
            max_tiles=most,
            thumbnail=model.use_thumbnail if given.thumbnail is None else given.thumbnail,
            dynamic=model.dynamic_image_size or given.max_tiles is not None,
        )

    def tile_image(self, loaded: LoadedImage, policy: TilePolicy) -> ProcessedImage:
        """Tile an open image."""
        tiles = to_tiles(loaded.image, policy)
        num_tokens = len(tiles) * self.config.num_image_token
        size = (loaded.width, loaded.height)
        info = ImageInfo(loaded.name, *size, len(tiles), num_tokens, loaded.note)
        return ProcessedImage(tiles, info)

    def compute_positions(
        self, ids: list[int], generation_config: GenerationConfig
    ) -> tuple[NDArray[np.float32], tuple[float, ...]]:
        """Return the position of every token, (L,), and the V2PE step of each image."""
        image_id = self.tokenizer.image_id
        num_images = len(image_spans(ids, image_id))
        deltas = self.resolve_deltas(ids, num_images, generation_config)
        return visual_positions(ids, image_id, deltas if num_images else 1.0), deltas

    def resolve_deltas(
        self, ids: list[int], num_images: int, generation_config: GenerationConfig
    ) -> tuple[float, ...]:
        """Return one V2PE step per image or frame; raise PromptError for another number."""
        given = generation_config.v2pe_delta
        if isinstance(given, str) or not isinstance(given, Sequence):
            return (self.resolve_delta(given, ids),) * num_images
        if len(given) != num_images:
            raise PromptError(
                f"{len(given)} V2PE steps for {num_images} images or frames; "
                "give one, or one for each"
            )
        return tuple(self.resolve_delta(delta, ids) for delta in given)

    def resolve_delta(self, given: V2PEDelta, ids: list[int]) -> float:
        """Parse one step; ``auto`` is the largest that keeps the prompt in the trained window."""
        step = parse_delta(given)
        if step != AUTO:
            return step
        return auto_delta(ids, self.tokenizer.image_id, self.config.text.max_position_embeddings)


def make_user_message(
    question: str, images: Sequence[ProcessedImage], videos: Sequence[ProcessedVideo]
) -> tuple[Message, list[ProcessedImage]]:
    """Return the user's message, and its images and frames in the order of the prompt."""
    shown = [*((image,) for image in images), *(video.frames for video in videos)]
    media = [*(MessageMedia((image.info.tiles,)) for image in images), *(v.media for v in videos)]
    message = Message("user", question, tuple(media))
    return message, [image for index in media_order(message) for image in shown[index]]


def as_sequence(images: InputImage | Sequence[InputImage]) -> Sequence[InputImage]:
    """Return a sequence as it is, and a single image as a list of one."""
    if isinstance(images, str | bytes) or not isinstance(images, Sequence):
        return [images]
    return cast(Sequence[InputImage], images)


def make_video(
    source: InputVideo, frames: Sequence[ProcessedFrame], generation_config: GenerationConfig
) -> ProcessedVideo:
    """Put the frames of a video together, with their times where the prompt is to name them."""
    name = shorten_name(str(source)) if isinstance(source, str | Path) else "video"
    times = tuple(frame.seconds for frame in frames) if generation_config.frame_times else None
    return ProcessedVideo(name, tuple(frame.image for frame in frames), times)


def retile_message(message: Message, remaining: list[int]) -> Message:
    """Return a past message with the tile counts its images have now, taken from ``remaining``."""
    media: list[MessageMedia] = []
    for shown in message.media:
        if shown.kind == "image":
            if not remaining:
                raise PromptError(
                    "the history has more images than were given; pass all of them in images"
                )
            media.append(MessageMedia(tiles=(remaining.pop(0),)))
        else:
            raise PromptError(
                "a video in the history cannot be read again; ask about it in the last message"
            )
    return replace(message, media=tuple(media))
