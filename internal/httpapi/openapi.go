package httpapi

import (
	"encoding"
	"encoding/json"
	"maps"
	"net/http"
	"path"
	"reflect"
	"slices"
	"strings"
	"time"

	"ringwall/internal/control"
	"ringwall/internal/resource"
)

// Describe adds the OpenAPI document of every route and every type of resource.
func Describe(kinds []control.Kind) Option {
	return func(a *API) {
		a.routes = append(a.routes, Route{
			Method: http.MethodGet, Path: "/ringwall/openapi.json", Summary: "This document",
			Serve: func(w http.ResponseWriter, _ *http.Request, _ control.Actor) error {
				b, err := OpenAPI(a.Routes(), kinds)
				if err != nil {
					return err
				}
				w.Header().Set("Content-Type", "application/vnd.oai.openapi+json; version=3.1")
				_, _ = w.Write(b) // the client may be gone
				return nil
			},
		})
	}
}

type object = map[string]any

// OpenAPI describes routes that have a summary, and the documents of the tree,
// as OpenAPI 3.1. The same input gives the same bytes.
func OpenAPI(routes []Route, kinds []control.Kind) ([]byte, error) {
	d := &describer{paths: object{}, schemas: object{}, names: map[reflect.Type]string{}}
	d.envelope()
	for _, r := range routes {
		if r.Summary != "" {
			d.route(&r)
		}
	}
	for i := range kinds {
		d.kind(&kinds[i])
	}
	doc := object{
		"openapi": "3.1.0",
		"info": object{
			"title": "Ringwall", "version": "1",
			"description": "The management API of a Ringwall server. Everything that is managed is a document in one tree, in the envelope of Azure Resource Manager.",
		},
		"security": []object{{"token": []string{}}, {"certificate": []string{}}},
		"paths":    d.paths,
		"components": object{
			"schemas": d.schemas,
			"securitySchemes": object{
				"token":       object{"type": "http", "scheme": "bearer", "description": "An ID token of a sign-on, or a token of ringwall token create."},
				"certificate": object{"type": "mutualTLS", "description": "The client certificate of a service."},
			},
			"parameters": object{
				"scope":          parameter("scope", "path", true, "a place in the tree without its first slash, such as subscriptions/ID/resourceGroups/NAME; its slashes stay as they are"),
				"ifMatch":        parameter("If-Match", "header", false, "only if the document still has this ETag"),
				"ifNoneMatch":    parameter("If-None-Match", "header", false, "*: only if there is no such document"),
				"idempotencyKey": parameter("Idempotency-Key", "header", false, "for a day the same request with the same key gets the same answer and is done once"),
				"dryRun":         parameter("dryRun", "query", false, "true: check everything and store nothing"),
				"top":            parameter("$top", "query", false, "documents a page, at most 1000"),
				"skip":           parameter("$skiptoken", "query", false, "of nextLink"),
			},
			"responses": object{"error": object{"description": "What went wrong, by its status and code.", "content": content(ref("Error"))}},
		},
	}
	return json.MarshalIndent(doc, "", " ")
}

func parameter(name, in string, required bool, about string) object {
	return object{"name": name, "in": in, "required": required, "description": about, "schema": object{"type": "string"}}
}

func ref(schema string) object     { return object{"$ref": "#/components/schemas/" + schema} }
func shared(name string) object    { return object{"$ref": "#/components/parameters/" + name} }
func content(schema object) object { return object{"application/json": object{"schema": schema}} }

func response(about string, schema object) object {
	out := object{"description": about}
	if schema != nil {
		out["content"] = content(schema)
	}
	return out
}

type describer struct {
	paths, schemas object
	names          map[reflect.Type]string
}

func (d *describer) envelope() {
	text := object{"type": "string"}
	d.schemas["Error"] = object{"type": "object", "properties": object{"error": object{
		"type": "object", "required": []string{"code", "message"}, "properties": object{"code": text, "message": text},
	}}}
	d.schemas["Envelope"] = object{
		"type": "object", "description": "What every document has.",
		"properties": object{
			"id": object{"type": "string", "readOnly": true}, "name": object{"type": "string", "readOnly": true}, "type": object{"type": "string", "readOnly": true},
			"location": text, "tags": object{"type": "object", "additionalProperties": text}, "etag": object{"type": "string", "readOnly": true},
			"systemData": object{"type": "object", "readOnly": true},
		},
	}
}

// operation adds one; answers always include an error.
func (d *describer) operation(path, method string, op object) {
	op["responses"].(object)["default"] = object{"$ref": "#/components/responses/error"} //nolint:forcetypeassert // made below
	at, _ := d.paths[path].(object)
	if at == nil {
		at = object{}
		d.paths[path] = at
	}
	at[strings.ToLower(method)] = op
}

// segments are the {parameters} of a pattern of http.ServeMux.
func segments(pattern string) (out []string) {
	for s := range strings.SplitSeq(pattern, "/") {
		if name, ok := strings.CutPrefix(s, "{"); ok {
			out = append(out, strings.TrimSuffix(name, "}"))
		}
	}
	return out
}

func (d *describer) route(r *Route) {
	id := strings.ToLower(r.Method) + strings.NewReplacer("/", "_", ".", "_", "{", "", "}", "").Replace(r.Path)
	op := object{"operationId": id, "summary": r.Summary, "tags": []string{"ringwall"}}
	var params []object
	for _, name := range segments(r.Path) {
		params = append(params, parameter(name, "path", true, name))
	}
	for _, q := range r.Query {
		params = append(params, parameter(q.Name, "query", false, q.About))
	}
	if r.Method != http.MethodGet {
		params = append(params, shared("idempotencyKey"))
	}
	if params != nil {
		op["parameters"] = params
	}
	if r.Body != nil {
		op["requestBody"] = object{"required": true, "content": content(d.schema(reflect.TypeOf(r.Body)))}
	}
	var answer object
	if r.Answer != nil {
		answer = d.schema(reflect.TypeOf(r.Answer))
	}
	if r.Public {
		op["security"] = []object{}
	}
	done := response("Done.", answer)
	if r.Media != "" {
		done["content"] = object{r.Media: object{"schema": object{"type": "string"}}}
	}
	op["responses"] = object{"200": done}
	d.operation(r.Path, r.Method, op)
}

// kind describes the documents of a type: where they are, and what can be done
// to them.
func (d *describer) kind(k *control.Kind) {
	name := strings.NewReplacer(".", "_", "/", "_").Replace(k.Type)
	list, one, params := placesOf(k.Type)
	properties := object{"type": "object"}
	if len(k.Schema) > 0 {
		var s object
		if json.Unmarshal(k.Schema, &s) == nil {
			defs, _ := s["$defs"].(object)
			delete(s, "$defs")
			for def, v := range defs {
				d.schemas[name+"_"+def] = moved(v, name)
			}
			d.schemas[name+"_properties"] = moved(s, name)
			properties = ref(name + "_properties")
		}
	}
	d.schemas[name] = object{"allOf": []object{ref("Envelope"), {"type": "object", "properties": object{"properties": properties}}}}
	about := k.About
	if about == "" {
		about = "A document of the type " + k.Type + "."
	}
	with := func(more ...object) []object { return append(slices.Clone(params), more...) }
	tags := []string{k.Type}
	d.operation(one, "get", object{
		"operationId": name + "_get", "summary": "Read", "description": about, "tags": tags, "parameters": with(),
		"responses": object{"200": response("The document.", ref(name))},
	})
	d.operation(one, "put", object{
		"operationId": name + "_put", "summary": "Create or change", "description": about, "tags": tags,
		"parameters":  with(shared("ifMatch"), shared("ifNoneMatch"), shared("idempotencyKey"), shared("dryRun")),
		"requestBody": object{"required": true, "content": content(ref(name))},
		"responses":   object{"200": response("Changed.", ref(name)), "201": response("Created.", ref(name))},
	})
	d.operation(one, "delete", object{
		"operationId": name + "_delete", "summary": "Delete", "tags": tags,
		"parameters": with(shared("ifMatch"), shared("idempotencyKey"), shared("dryRun")),
		"responses":  object{"200": response("Deleted.", nil), "204": response("It was not there.", nil)},
	})
	for _, action := range slices.Sorted(maps.Keys(k.Actions)) {
		d.operation(one+"/"+action, "post", object{
			"operationId": name + "_" + action, "summary": action + ", which takes " + k.Type + "/" + action + "/action", "tags": tags,
			"parameters":  with(shared("idempotencyKey")),
			"requestBody": object{"content": content(object{"type": "object"})},
			"responses":   object{"200": response("Done.", object{})},
		})
	}
	d.operation(list, "get", object{
		"operationId": name + "_list", "summary": "List", "description": about, "tags": tags,
		"parameters": append(slices.Clone(params[:len(params)-1]), shared("top"), shared("skip")),
		"responses": object{"200": response("A page.", object{
			"type": "object", "required": []string{"value"},
			"properties": object{"value": object{"type": "array", "items": ref(name)}, "nextLink": object{"type": "string"}},
		})},
	})
}

// moved is a schema whose own definitions stand among everybody's.
func moved(v any, name string) any {
	switch v := v.(type) {
	case object:
		for key, x := range v {
			to, _ := x.(string)
			if def, ok := strings.CutPrefix(to, "#/$defs/"); key == "$ref" && ok {
				v[key] = "#/components/schemas/" + name + "_" + def
				continue
			}
			v[key] = moved(x, name)
		}
	case []any:
		for i := range v {
			v[i] = moved(v[i], name)
		}
	}
	return v
}

// placesOf are the paths of a type's lists and documents; the last parameter is
// the document's name.
func placesOf(kind string) (list, one string, params []object) {
	name := func(n string) object { return parameter(n, "path", true, "the name of the document") }
	switch {
	case strings.EqualFold(kind, control.TypeSubscription):
		return "/subscriptions", "/subscriptions/{subscription}", []object{name("subscription")}
	case strings.EqualFold(kind, control.TypeGroup):
		list = "/subscriptions/{subscription}/resourceGroups"
		return list, list + "/{group}", []object{name("subscription"), name("group")}
	}
	parts := strings.Split(kind, "/")
	one = "/{scope}/providers/" + parts[0]
	params = []object{shared("scope")}
	if strings.EqualFold(parts[0], "Ringwall.Identity") { // right below the root only
		one, params = "/providers/"+parts[0], nil
	}
	for i, p := range parts[1:] {
		own := "name"
		if i < len(parts)-2 {
			own = p + "Name"
		}
		list = one + "/" + p
		one = list + "/{" + own + "}"
		params = append(params, name(own))
	}
	return list, one, params
}

// schema describes a Go type as encoding/json writes it.
func (d *describer) schema(t reflect.Type) object {
	if t == nil {
		return object{}
	}
	switch {
	case t == reflect.TypeFor[time.Time]():
		return object{"type": "string", "format": "date-time"}
	case t == reflect.TypeFor[json.RawMessage]():
		return object{}
	case t == reflect.TypeFor[resource.Document]():
		return ref("Envelope")
	case t.Implements(reflect.TypeFor[encoding.TextMarshaler]()), reflect.PointerTo(t).Implements(reflect.TypeFor[encoding.TextMarshaler]()):
		return object{"type": "string"}
	}
	switch t.Kind() {
	case reflect.Pointer:
		return d.schema(t.Elem())
	case reflect.Bool:
		return object{"type": "boolean"}
	case reflect.String:
		return object{"type": "string"}
	case reflect.Float32, reflect.Float64:
		return object{"type": "number"}
	case reflect.Slice, reflect.Array:
		if t.Elem().Kind() == reflect.Uint8 {
			return object{"type": "string", "contentEncoding": "base64"}
		}
		return object{"type": []string{"array", "null"}, "items": d.schema(t.Elem())}
	case reflect.Map:
		return object{"type": []string{"object", "null"}, "additionalProperties": d.schema(t.Elem())}
	case reflect.Struct:
		return d.structure(t)
	case reflect.Interface:
		return object{}
	}
	return object{"type": "integer"}
}

func (d *describer) structure(t reflect.Type) object {
	if t.Name() == "" {
		properties, required := object{}, []string{}
		d.fields(t, properties, &required)
		return object{"type": "object", "properties": properties, "required": required}
	}
	if name, ok := d.names[t]; ok {
		return ref(name)
	}
	name := path.Base(t.PkgPath()) + "_" + t.Name()
	d.names[t] = name // before its fields, which may hold it
	properties, required := object{}, []string{}
	d.fields(t, properties, &required)
	d.schemas[name] = object{"type": "object", "properties": properties, "required": required}
	return ref(name)
}

func (d *describer) fields(t reflect.Type, properties object, required *[]string) {
	for f := range t.Fields() {
		tag := f.Tag.Get("json")
		name, options, _ := strings.Cut(tag, ",")
		if f.Anonymous && name == "" && f.Type.Kind() == reflect.Struct {
			d.fields(f.Type, properties, required)
			continue
		}
		if !f.IsExported() || tag == "-" {
			continue
		}
		if name == "" {
			name = f.Name
		}
		properties[name] = d.schema(f.Type)
		if f.Type.Kind() != reflect.Pointer && !strings.Contains(options, "omit") {
			*required = append(*required, name)
		}
	}
}
