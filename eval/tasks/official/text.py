"""The TextVQA family, whose pictures are Open Images: TextVQA's questions (Singh et al. 2019), TextCaps (Sidorov et al. 2020).

    TextVQA_0.5.1_{split}.json     data: [{question_id, question, image_id, answers: [10 strings]}]
    TextCaps_0.1_{split}.json      data: [{image_id, caption_str}], one entry a caption

`image_file` makes an image's file name of its id. OCR tokens that come with the files are not shown to the model.
"""

from __future__ import annotations

from eval.tasks.official.annotations import columns, entries, load
from eval.tasks.official.records import FolderImages, Records, Side


def textvqa(side: Side, *, annotations: str, images: str, image_file: str) -> Records:
    path = side.file("annotations", annotations)
    data = entries(load(path), path, "data", "TextVQA's questions")
    rows = columns(data, path, "data", "question_id", "image_id", "question", "answers")
    names = side.file_names(image_file, [image for _, image, _, _ in rows])
    folder = side.folder("images", images)
    ids = [str(number) for number, _, _, _ in rows]
    return Records(path, ids, names, [row[2] for row in rows], [row[3] for row in rows], FolderImages(folder, names))


def textcaps(side: Side, *, annotations: str, images: str, image_file: str) -> Records:
    """An item is an image, with its captions in the order of the file, wherever they stand in it."""
    path = side.file("annotations", annotations)
    rows = columns(entries(load(path), path, "data", "TextCaps"), path, "data", "image_id", "caption_str")
    by_image: dict[str, list[str]] = {}
    for name, (_, caption) in zip(side.file_names(image_file, [image for image, _ in rows]), rows, strict=True):
        by_image.setdefault(name, []).append(caption)
    names = list(by_image)
    return Records(path, names, names, None, list(by_image.values()), FolderImages(side.folder("images", images), names))
