"""Captions in COCO's layouts: COCO itself and NoCaps, and Karpathy's splits of COCO (Karpathy and Fei-Fei 2015).

    captions_{split}.json      images: [{id, file_name}]   annotations: [{image_id, caption}]
    dataset_coco.json          images: [{filepath, filename, split, sentences: [{raw}]}]

An item is an image, and its id and image id are the file name: numbers of COCO's mean other images in NoCaps.
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.errors import UserError
from eval.tasks.official.annotations import check_ids, columns, entries, load
from eval.tasks.official.records import FolderImages, Records, Side


def captions(side: Side, *, annotations: str, images: str) -> Records:
    """COCO style. Raises UserError for a caption of an image the file does not list, or an image id listed twice."""
    path = side.file("annotations", annotations)
    content = load(path)
    shape = "COCO captions"
    listed = columns(entries(content, path, "images", shape), path, "images", "id", "file_name")
    check_ids((number for number, _ in listed), path, "images", "id")
    by_image: dict[object, list[str]] = {number: [] for number, _ in listed}
    if len(by_image) < len(listed):
        numbers = [number for number, _ in listed]
        twice = next(number for number in numbers if numbers.count(number) > 1)
        raise UserError(f"{path}: images: the id {twice!r} is there {numbers.count(twice)} times. Bring the official file again.")
    said = columns(entries(content, path, "annotations", shape), path, "annotations", "image_id", "caption")
    check_ids((number for number, _ in said), path, "annotations", "image_id")
    for position, (number, caption) in enumerate(said):
        if number not in by_image:
            raise UserError(
                f"{path}: annotations[{position}] is of image_id {number!r}, and no entry of images has that id. Bring the "
                "official file again."
            )
        by_image[number].append(caption)
    names = [name for _, name in listed]
    folder = side.folder("images", images)
    return Records(path, names, names, None, [by_image[number] for number, _ in listed], FolderImages(folder, names))


def karpathy(side: Side, *, annotations: str, images: str, splits: Sequence[str]) -> Records:
    """Karpathy's splits `splits` (train, restval, val, test). `images`: the folder that holds each entry's `filepath`.

    Raises UserError if none of the images is of these splits.
    """
    path = side.file("annotations", annotations)
    listed = entries(load(path), path, "images", "Karpathy's splits")
    wanted = ("split", "filename", "filepath", "sentences")
    chosen = [entry for entry in columns(listed, path, "images", *wanted) if entry[0] in splits]
    if not chosen:
        there = sorted({str(entry["split"]) for entry in listed})
        raise UserError(f"{path}: no image of split {', '.join(splits)}; there are {', '.join(there) or 'none'}.")
    names = [name for _, name, _, _ in chosen]
    said = [columns(sentences, path, f"sentences of {name}", "raw") for _, name, _, sentences in chosen]
    files = [f"{place}/{name}" for _, name, place, _ in chosen]
    return Records(path, names, names, None, said, FolderImages(side.folder("images", images), files))
