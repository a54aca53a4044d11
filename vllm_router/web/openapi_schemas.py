"""The schemas of the control plane's answers, for its OpenAPI document.

They list every field that an answer has now; later versions may add more.
"""

from __future__ import annotations

from typing import Any

from vllm_router.fleet.state import State

Doc = dict[str, Any]

TEXT: Doc = {"type": "string"}
FLAG: Doc = {"type": "boolean"}
COUNT: Doc = {"type": "integer", "minimum": 0}
NUMBER: Doc = {"type": "number"}
TIME: Doc = {"type": ["string", "null"], "description": "ISO 8601, UTC."}


def array(items: Doc) -> Doc:
    return {"type": "array", "items": items}


def or_null(schema: Doc) -> Doc:
    return {**schema, "type": [schema["type"], "null"]}


def struct(required: Doc, **optional: Doc) -> Doc:
    return {
        "type": "object",
        "properties": {**required, **optional},
        "required": list(required),
    }


def ref(name: str) -> Doc:
    return {"$ref": f"#/components/schemas/{name}"}


_STATE: Doc = {
    "name": TEXT,
    "url": TEXT,
    "state": {"enum": [state.value for state in State]},
    "reason": TEXT,
    "since": TIME,
    "draining": FLAG,
    "in_flight": COUNT,
    "in_flight_elsewhere": COUNT,
}
_LOAD: Doc = {
    "load": NUMBER,
    "running": NUMBER,
    "waiting": NUMBER,
    "capacity": COUNT,
    "capacity_source": {"enum": ["configured", "learnt", "assumed"]},
}
_FIGURES: Doc = {
    "server": TEXT,
    **_LOAD,
    "leases": COUNT,
    "max_in_flight": or_null(COUNT),
    "metrics_fresh": FLAG,
}
_VALUES: Doc = {"type": "object", "additionalProperties": TEXT}


def _reason(name: str) -> Doc:
    """A text, and the same as a code with values, for translations."""
    return {
        name: TEXT,
        f"{name}_code": or_null(TEXT),
        f"{name}_values": _VALUES,
        f"{name}_also": array(struct({"code": TEXT, "values": _VALUES})),
    }


_RELOAD: Doc = {
    "source": or_null(TEXT),
    "generation": COUNT,
    "applied": COUNT,
    "refused": COUNT,
    "error": or_null(TEXT),
}
_HEALTH_OF_SERVER: Doc = {
    **_STATE,
    "healthy": FLAG,
    "leaving": FLAG,
    "source": or_null(TEXT),
    "last_check": TIME,
    "consecutive_failures": COUNT,
    "success_rate": or_null(NUMBER),
    "avg_response_time": or_null(NUMBER),
    "last_response_time": or_null(NUMBER),
    "total_checks": COUNT,
    "failed_requests_in_row": COUNT,
    "ejections": COUNT,
    "ejected_for": or_null(NUMBER),
    "supported_models": array(TEXT),
    "models_last_updated": TIME,
}
_LOAD_OF_SERVER: Doc = {
    **_STATE,
    "current_load": NUMBER,
    "max_capacity": COUNT,
    "capacity_source": _LOAD["capacity_source"],
    "available_capacity": NUMBER,
    "utilization_percent": NUMBER,
    "status": FLAG,
    "last_updated": TIME,
    "detailed_metrics": struct(
        {
            "num_requests_running": NUMBER,
            "num_requests_waiting": NUMBER,
            "gpu_cache_usage_perc": NUMBER,
            "process_max_fds": COUNT,
        }
    ),
    "load": NUMBER,
    "max_in_flight": or_null(COUNT),
    "metrics_fresh": FLAG,
    "metrics_age": or_null(NUMBER),
    "models": or_null(array(TEXT)),
    "served": COUNT,
}

SCHEMAS: Doc = {
    "Error": struct(
        {
            "error": struct(
                {
                    "message": TEXT,
                    "type": TEXT,
                    "param": or_null(TEXT),
                    "code": or_null(TEXT),
                },
                values=_VALUES,
            )
        }
    ),
    "Model": struct({"id": TEXT}, object=TEXT),
    "Models": struct({"object": {"const": "list"}, "data": array(ref("Model"))}),
    "Alive": struct({"alive": {"const": True}}),
    "Ready": struct({"ready": FLAG}, reason=TEXT, servers=array(TEXT), sources=array(TEXT)),
    "Health": struct(
        {
            "status": {"enum": ["healthy", "degraded", "unhealthy", "no_servers"]},
            "ready": FLAG,
        },
        health_score=NUMBER,
        total_servers=COUNT,
        healthy_servers=COUNT,
        unhealthy_servers=COUNT,
        servers=array(struct(_HEALTH_OF_SERVER)),
        config=struct(
            {
                "health_check_enabled": FLAG,
                "health_check_interval": NUMBER,
                "min_success_rate": NUMBER,
                "max_response_time": NUMBER,
            }
        ),
        version=TEXT,
        uptime_seconds=NUMBER,
        draining=FLAG,
        in_flight=COUNT,
        reload=struct(_RELOAD),
        sources=array({"type": "object"}),
        shared=or_null({"type": "object"}),
        task_restarts=COUNT,
    ),
    "LoadStats": struct(
        {
            "servers": array(struct(_LOAD_OF_SERVER)),
            "summary": struct(
                {
                    "total_servers": COUNT,
                    "healthy_servers": COUNT,
                    "total_active_load": NUMBER,
                    "total_capacity": COUNT,
                    "overall_utilization_percent": NUMBER,
                    "in_flight": COUNT,
                    "in_flight_elsewhere": COUNT,
                    "queued": COUNT,
                }
            ),
        }
    ),
    "ServerModels": struct(
        {
            "servers": {
                "type": "object",
                "description": "By URL.",
                "additionalProperties": struct(
                    {
                        "name": TEXT,
                        "supported_models": array(TEXT),
                        "models_known": FLAG,
                        "models_last_updated": TIME,
                        "healthy": FLAG,
                    }
                ),
            },
            "total_servers": COUNT,
            "healthy_servers": COUNT,
        }
    ),
    "Version": struct({"version": TEXT, "service": TEXT}),
    "ServerLoad": struct({"server_load": COUNT}),
    "Service": struct({"service": TEXT, "status": {"enum": ["running", "draining"]}}, version=TEXT),
    "Explanation": struct(
        {
            "model": or_null(TEXT),
            "stream": FLAG,
            "model_known": FLAG,
            "session": or_null(TEXT),
            "session_source": or_null(TEXT),
            "served_model": or_null(TEXT),
            "policy": TEXT,
            "formula": or_null(TEXT),
            "owner": or_null(TEXT),
            "picked": or_null(TEXT),
            "would_wait": FLAG,
            "candidates": array(
                struct(
                    {
                        **_FIGURES,
                        "score": or_null(NUMBER),
                        "parts": {"type": "object", "additionalProperties": NUMBER},
                    }
                )
            ),
            "out": array(struct({**_FIGURES, "state": _STATE["state"], **_reason("reason")})),
            **_reason("note"),
        }
    ),
    "Decisions": struct(
        {
            "decisions": array(
                struct(
                    {
                        "time": NUMBER,
                        "request_id": TEXT,
                        "path": TEXT,
                        "model": or_null(TEXT),
                        "served_model": or_null(TEXT),
                        "policy": or_null(TEXT),
                        "stream": FLAG,
                        "server": or_null(TEXT),
                        "owner": or_null(TEXT),
                        "attempts": COUNT,
                        "retries": array(TEXT),
                        "outcome": TEXT,
                        "status": COUNT,
                        "code": or_null(TEXT),
                        "failed": FLAG,
                        "waited_seconds": NUMBER,
                        "first_byte_seconds": or_null(NUMBER),
                        "duration_seconds": NUMBER,
                    }
                )
            )
        }
    ),
    "Server": struct(
        {
            **_STATE,
            **_LOAD,
            "leaving": FLAG,
            "models": or_null(array(TEXT)),
        }
    ),
    "Servers": struct({"servers": array(ref("Server"))}),
    "Keys": struct(
        {
            "seconds": COUNT,
            "keys": array(
                struct({"name": TEXT, "requests": COUNT, "refused": COUNT, "tokens": COUNT})
            ),
            "more": COUNT,
        }
    ),
    "Code": struct({"code": TEXT, "seconds": NUMBER}),
    "SignedIn": struct({"key": TEXT, "seconds": NUMBER}),
    "Reload": struct({"result": TEXT, **_RELOAD}),
}
