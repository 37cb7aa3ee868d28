package rollouts

// JSON Schemas (draft 2020-12) of what people write, for the OpenAPI document.
// What decides is check; a test holds the two together.
const (
	schemaRollout = `{
  "type": "object",
  "required": ["manifest"],
  "additionalProperties": false,
  "properties": {
    "manifest": {"$ref": "#/$defs/sha256", "description": "The signed manifest."},
    "rollback": {"$ref": "#/$defs/sha256", "description": "The signed manifest that undoes it."},
    "no_rollback": {"type": "boolean", "description": "There is no way back: harm stops the rollout, and hosts keep the change."},
    "reason": {"type": "string", "maxLength": 2000},
    "selector": {"type": "object", "maxProperties": 20, "additionalProperties": {"type": "string"}, "description": "Only hosts with all these labels."},
    "rings": {"type": "array", "maxItems": 64, "description": "In order; empty: the usual ones.", "items": {
      "type": "object", "required": ["name", "percent"], "additionalProperties": false,
      "properties": {
        "name": {"type": "string", "minLength": 1},
        "percent": {"type": "number", "minimum": 0, "maximum": 100, "description": "Of all hosts, the rings before included; 100 for the last."},
        "hosts": {"type": "array", "items": {"type": "string"}, "description": "Ids of hosts that are in it in any case."},
        "bake": {"type": "object", "additionalProperties": false, "properties": {
          "time": {"$ref": "#/$defs/duration"},
          "host_hours": {"type": "number", "minimum": 0},
          "coverage": {"type": "number", "minimum": 0, "maximum": 1, "description": "Share of what the next ring runs that was seen here."}
        }}
      }
    }},
    "max_unavailable": {"type": "integer", "minimum": 0, "description": "Hosts that may be on their way at once; 0: no bound."},
    "limits": {"type": "object", "additionalProperties": false, "properties": {
      "converged": {"type": "number", "minimum": 0, "maximum": 1},
      "flip_hosts": {"type": "integer", "minimum": 0},
      "small_ring": {"type": "integer", "minimum": 0},
      "false_alarm": {"type": "number", "minimum": 0, "exclusiveMaximum": 0.5},
      "apply_time": {"$ref": "#/$defs/duration"}
    }},
    "probes": {"type": "array", "maxItems": 10, "items": {
      "type": "object", "required": ["name", "url", "no_data"], "additionalProperties": false,
      "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 200},
        "url": {"type": "string", "pattern": "^https?://", "maxLength": 2000},
        "query": {"type": "string", "maxLength": 4000, "description": "PromQL; without one the URL itself must answer 200."},
        "max": {"type": "number"},
        "min": {"type": "number"},
        "no_data": {"enum": ["hold", "fail"]},
        "min_samples": {"type": "integer", "minimum": 0},
        "failures": {"type": "integer", "minimum": 0, "description": "In a row; 0 is 3."}
      }
    }},
    "waive": {"type": "array", "maxItems": 1000, "items": {
      "type": "object", "required": ["sha256", "reason"], "additionalProperties": false,
      "properties": {"sha256": {"$ref": "#/$defs/sha256"}, "reason": {"type": "string", "minLength": 1, "maxLength": 2000}}
    }},
    "emergency": {"type": "object", "required": ["reason", "until"], "additionalProperties": false, "properties": {
      "reason": {"type": "string", "minLength": 1, "maxLength": 2000},
      "until": {"type": "string", "format": "date-time"}
    }},
    "status": {"type": "object", "readOnly": true, "description": "Where it stands; the server's."}
  },
  "$defs": {
    "sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
    "duration": {"type": ["string", "number"], "description": "Such as 1h30m; a number is seconds."}
  }
}`
	schemaHalt = `{
  "type": "object",
  "required": ["reason"],
  "additionalProperties": false,
  "properties": {
    "reason": {"type": "string", "minLength": 1, "maxLength": 2000},
    "from": {"type": "string", "format": "date-time", "description": "With it, or with weekly, it is a freeze: an emergency passes it."},
    "until": {"type": "string", "format": "date-time"},
    "weekly": {"type": "array", "maxItems": 50, "items": {
      "type": "object", "required": ["days", "from", "to"], "additionalProperties": false,
      "properties": {
        "days": {"type": "array", "minItems": 1, "items": {"enum": ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]}},
        "from": {"type": "string", "pattern": "^[0-2][0-9]:[0-5][0-9]$"},
        "to": {"type": "string", "pattern": "^[0-2][0-9]:[0-5][0-9]$"}
      }
    }},
    "time_zone": {"type": "string", "description": "Of the IANA database; UTC without one."}
  }
}`
)
