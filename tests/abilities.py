"""What a worker may say of a checkpoint, as it is published."""

from policy import capabilities

NO_PICTURES = {"init_image": "none", "mask": "none", "control_image": "none"}
PLAIN = {
    "format": capabilities.FORMAT,
    "family": "sd",
    "pictures": {**NO_PICTURES, "init_image": "optional"},
    "samplers": {
        "ddim": {"max_steps": 1000, "takes_picture": True},
        "euler": {"max_steps": 8, "takes_picture": False},
    },
    "negative_prompt": "guided",
    "max_clip_skip": 1,
    "rows_guided": 2,
}
NEEDED = {"pictures": {**NO_PICTURES, "init_image": "required", "mask": "required"}}
