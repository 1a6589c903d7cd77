"""`/v1/edits`: add, list, look at, explain, export, switch off, remove and take back."""

from __future__ import annotations

import io
import secrets
from dataclasses import asdict
from typing import Any, Literal

from fastapi import APIRouter, Depends, Request, Response

from .pictures import open_sent
from .schema import By, NewEdit, Question, edit_json, explanation_json
from .service import Service
from .settings import Refused


def may_change(service: Service, token: str | None) -> bool:
    """Whether a token allows changes."""
    wanted = service.settings.token
    return wanted is None or (token is not None and secrets.compare_digest(token.encode(), wanted.encode()))


def edit_routes(service: Service) -> APIRouter:
    """The routes of a service for its edits. Changes and the export ask for the bearer token."""
    router, settings = APIRouter(prefix="/v1/edits"), service.settings

    def owner(request: Request) -> None:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if not may_change(service, token.strip() if kind.lower() == "bearer" else None):
            raise Refused(401, "invalid_token", "Changes need the token: Authorization: Bearer TOKEN.")

    def writer(request: Request) -> None:
        if settings.read_only:
            raise Refused(403, "read_only", "The service is read-only: its edits cannot be changed.")
        owner(request)

    def opened(sent: str | None):
        return None if sent is None else open_sent(sent, settings)

    @router.get("")
    def listed() -> dict[str, Any]:
        return {"object": "list", "data": [edit_json(edit) for edit in service.edits]}

    @router.post("", status_code=201, dependencies=[Depends(writer)])
    def add(new: NewEdit) -> dict[str, Any]:
        edit = service.add(
            new.who, opened(new.image), new.prompt, new.target, rephrases=new.rephrases or None,
            negatives=[opened(sent) for sent in new.negatives] or None, keep_failed=new.keep_failed,
        )  # fmt: skip
        return edit_json(edit)

    @router.post("/undo", dependencies=[Depends(writer)])
    def undo(by: By | None = None) -> dict[str, Any]:
        return edit_json(service.undo(by.who if by else ""))

    @router.post("/redo", dependencies=[Depends(writer)])
    def redo(by: By | None = None) -> dict[str, Any]:
        return edit_json(service.undo(by.who if by else "", again=True))

    @router.post("/explain")
    def explain(asked: Question) -> dict[str, Any]:
        return explanation_json(service.explain(opened(asked.image), asked.prompt))

    @router.get("/export", dependencies=[Depends(owner)])
    def export(format: Literal["jsonl", "zip"] = "jsonl") -> Response:
        kind = "application/zip" if format == "zip" else "application/jsonl"
        headers = {"Content-Disposition": f'attachment; filename="edits.{format}"'}
        return Response(service.export(whole=format == "zip"), media_type=kind, headers=headers)

    @router.get("/changes")
    def changes() -> dict[str, Any]:
        return {"object": "list", "data": [asdict(change) for change in service.history.changes]}

    @router.get("/{edit_id}")
    def get(edit_id: int) -> dict[str, Any]:
        return edit_json(service.edit(edit_id))

    @router.get("/{edit_id}/picture")
    def picture(edit_id: int) -> Response:
        found = service.picture(edit_id)
        if found is None:
            raise Refused(404, "no_picture", f"Edit {edit_id} is about no picture.")
        kept = io.BytesIO()
        found.save(kept, "PNG")
        return Response(kept.getvalue(), media_type="image/png")

    @router.post("/{edit_id}/enable", dependencies=[Depends(writer)])
    def enable(edit_id: int, by: By | None = None) -> dict[str, Any]:
        return edit_json(service.enable(by.who if by else "", edit_id))

    @router.post("/{edit_id}/disable", dependencies=[Depends(writer)])
    def disable(edit_id: int, by: By | None = None) -> dict[str, Any]:
        return edit_json(service.enable(by.who if by else "", edit_id, on=False))

    @router.delete("/{edit_id}", dependencies=[Depends(writer)])
    def remove(edit_id: int, who: str = "") -> dict[str, Any]:
        return edit_json(service.remove(who[:80], edit_id))

    return router
