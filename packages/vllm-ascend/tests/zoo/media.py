# SPDX-License-Identifier: Apache-2.0
"""Requests with pictures, videos and sounds: random ones, which are written beside the checkpoint and read again by the engine's process."""

import numpy as np

KEYS = {"images": "image", "video": "video", "audio": "audio"}
PROCESSOR_KEYS = {"images": "images", "video": "videos", "audio": "audio"}
SAMPLING_RATE = 16000
# Height and width; the first and the last are of one size.
PICTURES = [(84, 56), (56, 112), (90, 61), (84, 56)]
VIDEOS = [(4, 56, 84), (6, 84, 56), (4, 56, 56), (4, 56, 84)]  # frames first
SOUNDS = [8000, 16000, 24000, 8000]  # samples


def random_media(task, folder):
    """Write four of them; returns their file names."""
    rng = np.random.default_rng(0)
    names = []
    for number in range(4):
        if task == "audio":
            made = rng.normal(size=SOUNDS[number]).astype(np.float32) / 10
        else:
            shape = PICTURES[number] if task == "images" else VIDEOS[number]
            made = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        names.append(f"{task}{number}.npy")
        np.save(folder / names[-1], made)
    return names


def load(task, folder, names):
    """What transformers' processors take."""
    arrays = [np.load(folder / name) for name in names]
    if task != "images":
        return arrays
    from PIL import Image

    return [Image.fromarray(array) for array in arrays]


def metadata(video):
    """What some processors want to know of a video: two frames a second, all of which are taken."""
    frames = len(video)
    return {
        "fps": 2.0, "total_num_frames": frames, "duration": frames / 2, "frames_indices": list(range(frames)), "video_backend": "opencv",
    }  # fmt: skip


def for_transformers(task, folder, names):
    """The processor's arguments."""
    if not names:
        return {}
    made = load(task, folder, names)
    more = {"video_metadata": [metadata(video) for video in made], "do_sample_frames": False} if task == "video" else {}
    return {PROCESSOR_KEYS[task]: made, **more}


def for_vllm(task, folder, names):
    """vLLM's `multi_modal_data`."""
    made = load(task, folder, names)
    if task == "video":
        made = [(video, metadata(video) | {"do_sample_frames": False}) for video in made]
    if task == "audio":
        made = [(array, SAMPLING_RATE) for array in made]
    return {KEYS[task]: made} if made else {}


def words(first, count):
    return " ".join(f"w{60 + (first + 17 * n * n + 5 * n) % 440}" for n in range(count))


def texts(mark, names):
    """(text, file names): without media; one; two of different sizes; and twice the same text, beyond a block, with two of one size."""
    long = f"{mark} {words(40, 150)}"
    return [
        (words(0, 12), []),
        (f"{words(5, 4)} {mark} {words(9, 8)}", names[1:2]),
        (f"{mark} {words(20, 6)} {mark} {words(31, 3)}", names[1:3]),
        (long, names[:1]),
        (long, names[3:]),
    ]
