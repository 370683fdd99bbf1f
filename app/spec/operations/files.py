"""Describe the operations of /v1/files."""

from app.http.files import CONTENT_TYPES
from app.schemas.files import File, FileForm, FilePage
from app.spec.operation import FORM, PAGE, PICTURE_PARAMETERS, Operation

_ITSELF = {"type": "string", "contentMediaType": "application/octet-stream"}

OPERATIONS: dict[tuple[str, str], Operation] = {
    ("POST", "/v1/files"): Operation(
        summary="Upload a picture",
        description="Stores a picture that jobs can start from. The same picture, uploaded again,"
        " is the same file. Send a form with the field `file`, or the bytes of the picture as the"
        " body.",
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
        description="Size, format and digest of a picture, without its content.",
        answers=(File,),
    ),
    ("GET", "/v1/files/{file_id}/content"): Operation(
        summary="Download a picture",
        description="Redirects to the stored picture, or answers with the picture itself, as"
        " `redirect` or else the operator chooses.",
        status=302,
        is_picture=True,
        parameters=PICTURE_PARAMETERS,
    ),
    ("DELETE", "/v1/files/{file_id}"): Operation(
        summary="Delete a picture",
        description="Deletes the picture. 409 while an unfinished job starts from it.",
        status=204,
    ),
}
