"""Official files of public benchmarks, read where they lie and offline: one small module a layout.

    configs/task/NAME.yaml, `files:`  ->  readers (coco, textcaps, vqa, gqa, parquet)  ->  Records  ->  OfficialPool  ->  TaskData

A reader is a function (side, **settings of the YAML) -> Records, named there by `_target_`; a layout of one's own is a function
in any importable module and a YAML file. docs/datasets.md says where each file goes.
"""
