"""Describe the operations of /v1/files."""

from app.http.files import CONTENT_TYPES
from app.schemas.files import File, FileForm, FilePage
from app.spec.operation import FORM, PAGE, PICTURE_PARAMETERS, Operation

_ITSELF = {"type": "string", "contentMediaType": "application/octet-stream"}

OPERATIONS: dict[tuple[str, str], Operation] = {
    ("POST", "/v1/files"): Operation(
        summary="Upload a picture",
        description="Keeps a picture for jobs to start from; the same picture has the same file."
        " Send a form with the field `file`, or the picture itself.",
        status=201,
        answers=(File,),
        body={kind: FileForm if kind == FORM else _ITSELF for kind in CONTENT_TYPES},
    ),
    ("GET", "/v1/files"): Operation(
        summary="List pictures",
        description="Your pictures, newest first.",
        answers=(FilePage,),
        parameters=PAGE,
    ),
    ("GET", "/v1/files/{file_id}"): Operation(
        summary="Show a picture's record",
        description="What is known of the picture.",
        answers=(File,),
    ),
    ("GET", "/v1/files/{file_id}/content"): Operation(
        summary="Fetch a picture",
        description="A redirect to where the picture is stored, or the picture itself.",
        status=302,
        is_picture=True,
        parameters=PICTURE_PARAMETERS,
    ),
    ("DELETE", "/v1/files/{file_id}"): Operation(
        summary="Delete a picture",
        description="Deletes the picture; 409 while an unfinished job starts from it.",
        status=204,
    ),
}
