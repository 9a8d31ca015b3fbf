"""COCO annotations of three images, one of them without a caption."""

CAPTIONS = {
    "images": [
        {"id": n, "file_name": f"{n}.png", "width": 200, "height": 100} for n in (7, 8, 9)
    ],
    "annotations": [
        {"image_id": 8, "caption": "A cat."},
        {"image_id": 7, "caption": "A dog\n on a chair. "},
        {"image_id": 7, "caption": "A chair."},
    ],
}  # fmt: skip
BOXES = {
    "categories": [{"id": 1, "name": "dog"}, {"id": 62, "name": "chair"}],
    "annotations": [
        {"image_id": 7, "category_id": 1, "bbox": [50, 25, 100, 50.5]},
        {"image_id": 7, "category_id": 62, "bbox": [-1, 0, 202, 99]},
        {"image_id": 12, "category_id": 1, "bbox": [0, 0, 1, 1]},
    ],
}
