package pki

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"reflect"
	"strings"
	"unicode/utf8"

	"ringwall/internal/errs"
)

const maxJSONDepth = 16

// UnmarshalStrict decodes a signed JSON document into the struct that v points
// to, in the one way that leaves no room for two readers to disagree: no more
// than limit bytes, valid UTF-8, nothing after the end, no unknown key, no
// repeated key, keys spelt exactly (encoding/json alone ignores case).
func UnmarshalStrict(data []byte, v any, limit int) error {
	if len(data) > limit {
		return fmt.Errorf("JSON of %d bytes (at most %d): %w", len(data), limit, errs.Invalid)
	}
	if !utf8.Valid(data) {
		return fmt.Errorf("JSON is not UTF-8: %w", errs.Invalid)
	}
	names := make(map[string]bool)
	fieldNames(reflect.TypeOf(v), names)
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	if err := checkValue(d, names, 0); err != nil {
		return fmt.Errorf("JSON: %w: %w", err, errs.Invalid)
	}
	if _, err := d.Token(); err != io.EOF {
		return fmt.Errorf("JSON: something follows the document: %w", errs.Invalid)
	}
	d = json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fmt.Errorf("JSON: %w: %w", err, errs.Invalid)
	}
	return nil
}

// fieldNames collects the JSON names of every struct field reachable from t.
func fieldNames(t reflect.Type, into map[string]bool) {
	switch t.Kind() {
	case reflect.Pointer, reflect.Slice, reflect.Array:
		fieldNames(t.Elem(), into)
	case reflect.Struct:
		for f := range t.Fields() {
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			if name != "" && name != "-" {
				into[name] = true
				fieldNames(f.Type, into)
			}
		}
	}
}

func checkValue(d *json.Decoder, names map[string]bool, depth int) error {
	if depth > maxJSONDepth {
		return fmt.Errorf("nested deeper than %d", maxJSONDepth)
	}
	t, err := d.Token()
	if err != nil {
		return err
	}
	switch t {
	case json.Delim('{'):
		seen := make(map[string]bool)
		for d.More() {
			k, err := d.Token()
			if err != nil {
				return err
			}
			key, ok := k.(string)
			if !ok || !names[key] {
				return fmt.Errorf("unknown key %.40q", k)
			}
			if seen[key] {
				return fmt.Errorf("key %q is repeated", key)
			}
			seen[key] = true
			if err := checkValue(d, names, depth+1); err != nil {
				return err
			}
		}
		_, err = d.Token()
	case json.Delim('['):
		for d.More() {
			if err := checkValue(d, names, depth+1); err != nil {
				return err
			}
		}
		_, err = d.Token()
	}
	return err
}
