"""`/v1/edits`: add, list, look at, explain, export, remove and take back."""

from __future__ import annotations

import secrets
from dataclasses import asdict
from typing import Any

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
        return {"object": "list", "data": [edit_json(service, edit) for edit in service.edits]}

    @router.post("", status_code=201, dependencies=[Depends(writer)])
    def add(new: NewEdit) -> dict[str, Any]:
        edit = service.add(
            new.who, opened(new.image), new.prompt, new.target, rephrases=new.rephrases or None,
            negatives=[opened(sent) for sent in new.negatives] or None, keep_failed=new.keep_failed,
        )  # fmt: skip
        return edit_json(service, edit)

    @router.post("/undo", dependencies=[Depends(writer)])
    def undo(by: By | None = None) -> dict[str, Any]:
        return {**edit_json(service, service.undo(by.who if by else "")), "stored": False}

    @router.post("/explain")
    def explain(asked: Question) -> dict[str, Any]:
        return explanation_json(service.explain(opened(asked.image), asked.prompt))

    @router.get("/export", dependencies=[Depends(owner)])
    def export() -> Response:
        headers = {"Content-Disposition": 'attachment; filename="edits.zip"'}
        return Response(service.export(), media_type="application/zip", headers=headers)

    @router.get("/changes")
    def changes() -> dict[str, Any]:
        return {"object": "list", "data": [asdict(change) for change in service.history.changes]}

    @router.get("/{edit_id}")
    def get(edit_id: int) -> dict[str, Any]:
        return edit_json(service, service.edit(edit_id))

    @router.get("/{edit_id}/picture")
    def picture(edit_id: int) -> Response:
        added = service.history.added(service.edit(edit_id).id)
        found = service.history.picture(added.picture) if added else None
        if found is None:
            raise Refused(404, "no_picture", f"No picture of edit {edit_id} is kept.")
        return Response(found, media_type="image/png")

    @router.delete("/{edit_id}", dependencies=[Depends(writer)])
    def remove(edit_id: int, who: str = "") -> dict[str, Any]:
        return {**edit_json(service, service.remove(who[:80], edit_id)), "stored": False}

    return router
