"""Official files of every benchmark, a few items each, in the shapes and with the keys and names they are published in.

Nothing is in the order of its numbers, captions of an image do not stand together, and COCO's numbers are other images in NoCaps.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tests.corpus import square

TRAIN = (9, 318219, 25, 57870, 30)
VAL = (391895, 42, 7)
OPEN_IMAGES = ("e6d1df3ae1a5ed5e", "003a8ae2ef43b901", "4be7b19b5a8ba9a4")
OPEN_IMAGES_TRAIN = ("b1d0a1f5c8e9d3a2", "0054c91397f2fe05", "0a1b2c3d4e5f6071")


def picture(name: object) -> bytes:
    """A different image for every name: one of 16 million colours."""
    return square(f"#{hashlib.sha256(str(name).encode()).hexdigest()[:6]}", 8)


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_images(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(picture(name))


def coco_name(split: str, number: int) -> str:
    return f"COCO_{split}2014_{number:012d}.jpg"


def coco_captions(names: dict[int, str]) -> dict[str, Any]:
    """Two captions an image: first one of each, then the other of each, the other way round."""
    first = [{"image_id": n, "id": 10 * n, "caption": f"one of {n}"} for n in names]
    second = [{"image_id": n, "id": 10 * n + 1, "caption": f"two of {n}"} for n in reversed(names)]
    images = [{"license": 3, "file_name": name, "height": 8, "width": 8, "id": n} for n, name in names.items()]
    return {"info": {}, "images": images, "licenses": [], "annotations": first + second}


def write_coco(root: Path) -> None:
    for split, numbers in (("train", TRAIN), ("val", VAL)):
        names = {number: coco_name(split, number) for number in numbers}
        write_json(root / f"coco/annotations/captions_{split}2014.json", coco_captions(names))
        write_images(root / f"coco/{split}2014", *names.values())
    where = [("train", n, "train") for n in TRAIN] + [("val", 391895, "test"), ("val", 42, "restval"), ("val", 7, "test")]
    images = [
        {
            "filepath": f"{folder}2014",
            "sentids": [0, 1],
            "filename": coco_name(folder, number),
            "imgid": imgid,
            "split": split,
            "sentences": [{"tokens": ["a"], "raw": f"{word} of {number}", "imgid": imgid, "sentid": 0} for word in ("A", "B")],
            "cocoid": number,
        }
        for imgid, (folder, number, split) in enumerate(where)
    ]
    write_json(root / "coco/dataset_coco.json", {"images": images, "dataset": "coco"})


def write_nocaps(root: Path) -> None:
    """Image ids are 0 to 4499 there: 9 and 25 are also training images of COCO."""
    names = {9: "0013ea2087020901.jpg", 25: "003a8ae2ef43b901.jpg", 0: "000a1249af2bc5f0.jpg"}
    write_json(root / "nocaps/nocaps_val_4500_captions.json", coco_captions(names))
    write_images(root / "nocaps/val", *names.values())


def write_textvqa(root: Path) -> None:
    for split, images, first in (("train", OPEN_IMAGES_TRAIN, 0), ("val", OPEN_IMAGES, 34602)):
        asked = [
            {
                "question_id": first + 10 - n,
                "question": f"what is written on {n}?",
                "image_id": images[n % 3],
                "image_classes": ["Sign"],
                "ocr_tokens": ["SECRET"],
                "answers": ["stop"] * 6 + ["go"] * 4,
                "set_name": split,
            }
            for n in range(4)
        ]
        write_json(root / f"textvqa/TextVQA_0.5.1_{split}.json", {"dataset_type": split, "data": asked})
        said = [
            {
                "image_id": image,
                "caption_str": f"{word} {image}",
                "caption_id": 0,
                "reference_strs": ["unused"],
                "image_name": image,
            }
            for word in ("reads", "says")
            for image in images
        ]
        write_json(root / f"textcaps/TextCaps_0.1_{split}.json", {"dataset_type": split, "data": said})
        write_images(root / "textvqa/train_images", *(f"{image}.jpg" for image in images))


def vqa_pair(numbers: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(questions, annotations) of two questions an image; the annotations in another order."""
    keys = [(number, number * 1000 + k) for k in (1, 0) for number in numbers]
    questions = [{"image_id": image, "question": f"is it {key}?", "question_id": key} for image, key in keys]
    annotations = [
        {
            "question_type": "is it",
            "multiple_choice_answer": "no",
            "answers": [
                {"answer": f"no {key}", "raw_answer": f"raw {key}", "answer_confidence": "yes", "answer_id": i + 1}
                for i in range(10)
            ],
            "image_id": image,
            "answer_type": "yes/no",
            "question_id": key,
        }
        for image, key in sorted(keys)
    ]
    return {"info": {}, "questions": questions}, {"info": {}, "annotations": annotations}


def write_vqa(root: Path) -> None:
    for task, version in (("vqav2", "v2_"), ("okvqa", "")):
        for split, numbers in (("train", TRAIN), ("val", VAL)):
            questions, annotations = vqa_pair(numbers)
            write_json(root / f"{task}/{version}OpenEnded_mscoco_{split}2014_questions.json", questions)
            write_json(root / f"{task}/{version}mscoco_{split}2014_annotations.json", annotations)


def write_gqa(root: Path) -> None:
    for split, first, images in (("train", "07", ("2354786", "713270", "99")), ("testdev", "20", ("n161313", "n578847", "n52"))):
        asked = {
            f"{first}{100 - n}": {
                "semantic": [{"operation": "select", "dependencies": [], "argument": "scene"}],
                "entailed": [],
                "equivalent": [f"{first}{100 - n}"],
                "question": f"is {images[n % 3]} indoors?",
                "imageId": images[n % 3],
                "isBalanced": True,
                "groups": {"global": None, "local": "06-sky_dark"},
                "answer": "yes" if n % 2 else "no",
                "semanticStr": "select: scene",
                "annotations": {"answer": {}, "question": {"2": "486"}, "fullAnswer": {}},
                "types": {"detailed": "verifyGlobal"},
                "fullAnswer": "Yes, it is indoors.",
            }
            for n in range(5)
        }
        write_json(root / f"gqa/{split}_balanced_questions.json", asked)
        write_images(root / "gqa/images", *(f"{image}.jpg" for image in images))


def write_vizwiz(root: Path) -> None:
    for split in ("train", "val"):
        names = [f"VizWiz_{split}_{number:08d}.jpg" for number in (3, 0, 17)]
        asked = [
            {
                "answerable": 0,
                "image": name,
                "question": "What's this?",
                "answer_type": "unanswerable",
                "answers": [{"answer_confidence": "yes", "answer": "unanswerable"}] * 7
                + [{"answer_confidence": "maybe", "answer": f"cup {name}"}] * 3,
            }
            for name in names
        ]
        write_json(root / f"vizwiz/{split}.json", asked)
        write_images(root / f"vizwiz/{split}", *names)


def write_all(root: Path) -> Path:
    for write in (write_coco, write_nocaps, write_textvqa, write_vqa, write_gqa, write_vizwiz):
        write(root)
    return root
