"""Questions about images: VQAv2 (Goyal et al. 2017) and OK-VQA (Marino et al. 2019), GQA (Hudson and Manning 2019), VizWiz
(Gurari et al. 2018).

    v2_OpenEnded_mscoco_{split}_questions.json    questions: [{question_id, image_id, question}]
    v2_mscoco_{split}_annotations.json            annotations: [{question_id, image_id, answers: [{answer}]}]
    {split}_balanced_questions.json               question id -> {imageId, question, answer}
    {split}.json (VizWiz)                         [{image, question, answers: [{answer}]}]

OK-VQA has the same pair without `v2_`. GQA has one answer a question. VizWiz has no question ids: an item's id is the file's name
and its position. `image_file` makes an image's file name of its id.
"""

from __future__ import annotations

from typing import Any

from configs.errors import UserError
from eval.tasks.official.annotations import check_ids, columns, entries, keep_text, load
from eval.tasks.official.records import FolderImages, Records, Side


def questions_and_annotations(
    side: Side, *, questions: str, annotations: str, images: str, image_file: str, answer_key: str = "answer"
) -> Records:
    """VQAv2's pair of files, in the order of the questions; annotations of other questions are left alone. `answer_key`: which
    string of an answer counts (OK-VQA has `raw_answer` too).

    Raises UserError for a question without an annotation, or with one of another image.
    """
    answers_path, path = side.file("annotations", annotations), side.file("questions", questions)
    asked = entries(load(path), path, "questions", "VQA questions")
    rows = columns(asked, path, "questions", "question_id", "image_id", "question")
    check_ids((number for number, _, _ in rows), path, "questions", "question_id")
    answered = entries(load(answers_path, keep_text(answer_key)), answers_path, "annotations", "VQA annotations")
    by_question: dict[Any, tuple[Any, Any]] = {}
    given = columns(answered, answers_path, "annotations", "question_id", "image_id", "answers")
    check_ids((number for number, _, _ in given), answers_path, "annotations", "question_id")
    for number, image, said in given:
        if number in by_question:
            raise UserError(f"{answers_path}: question_id {number} is annotated twice. Bring the official file again.")
        by_question[number] = (image, said)
    references = []
    for number, image, _ in rows:
        found = by_question.get(number)
        if found is None:
            raise UserError(
                f"{path}: question_id {number} has no annotation in {answers_path}. Give questions and annotations of the same "
                f"split: {side.key('annotations')}=PATH."
            )
        if found[0] != image:
            raise UserError(
                f"{path}: question_id {number} is about image_id {image}, its annotation in {answers_path} about {found[0]}. "
                "Give questions and annotations of the same split."
            )
        references.append(found[1])
    names = side.file_names(image_file, [image for _, image, _ in rows])
    folder = side.folder("images", images)
    ids = [str(number) for number, _, _ in rows]
    return Records(path, ids, names, [row[2] for row in rows], references, FolderImages(folder, names), answers_path)


def gqa(side: Side, *, annotations: str, images: str, image_file: str) -> Records:
    """Raises UserError for a question without image, question or answer, or whose id is there twice."""
    path = side.file("annotations", annotations)
    found = load(path, _gqa_question, pairs=True)
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path}: holds no questions by id; GQA's files do. Is it the official file of this task?")
    wrong = next(((number, row) for number, row in found.items() if type(row) is not tuple), None)
    if wrong is not None:
        raise UserError(
            f"{path}: question {wrong[0]!r} has no imageId, question and answer (found {str(wrong[1])[:200]}). Give the file "
            "of a split with public answers."
        )
    names = side.file_names(image_file, [image for image, _, _ in found.values()])
    questions = [question for _, question, _ in found.values()]
    references = [[answer] for _, _, answer in found.values()]
    return Records(path, list(found), names, questions, references, FolderImages(side.folder("images", images), names))


def _gqa_question(pairs: list[tuple[str, Any]]) -> Any:
    """A question's three strings as a tuple: its parse, most of a file of a gigabyte, is let go as it is read. As a dict, the
    later of two questions of one id would replace the other in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    try:
        return found["imageId"], found["question"], found["answer"]
    except KeyError:
        return found


def vizwiz(side: Side, *, annotations: str, images: str) -> Records:
    path = side.file("annotations", annotations)
    found = entries(load(path, keep_text("answer")), path, None, "VizWiz's questions")
    rows = columns(found, path, "", "image", "question", "answers")
    names = [image for image, _, _ in rows]
    ids = [f"{path.stem}-{position}" for position in range(len(rows))]
    folder = side.folder("images", images)
    return Records(path, ids, names, [row[1] for row in rows], [row[2] for row in rows], FolderImages(folder, names))
