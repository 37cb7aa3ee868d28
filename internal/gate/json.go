package gate

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"unicode/utf8"

	"ringwall/internal/errs"
)

const maxJSONDepth = 40

// object is a JSON object whose keys were compared exactly and found once each.
// encoding/json alone takes the last of two equal keys and ignores case, so
// that two readers of one signed statement could see two.
type object map[string]any

// parseJSON reads one JSON value of at most limit bytes. Objects become object,
// lists []any, numbers json.Number.
func parseJSON(data []byte, limit int) (any, error) {
	if len(data) > limit {
		return nil, fmt.Errorf("JSON of %d bytes (at most %d): %w", len(data), limit, errs.Invalid)
	}
	if !utf8.Valid(data) {
		return nil, fmt.Errorf("JSON is not UTF-8: %w", errs.Invalid)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	v, err := jsonValue(d, 0)
	if err != nil {
		return nil, fmt.Errorf("JSON: %w: %w", err, errs.Invalid)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("JSON: something follows the document: %w", errs.Invalid)
	}
	return v, nil
}

// parseObject is parseJSON for what must be an object.
func parseObject(data []byte, limit int) (object, error) {
	v, err := parseJSON(data, limit)
	if err != nil {
		return nil, err
	}
	o, ok := v.(object)
	if !ok {
		return nil, fmt.Errorf("JSON: not an object: %w", errs.Invalid)
	}
	return o, nil
}

func jsonValue(d *json.Decoder, depth int) (any, error) {
	if depth > maxJSONDepth {
		return nil, fmt.Errorf("nested deeper than %d", maxJSONDepth)
	}
	t, err := d.Token()
	if err != nil {
		return nil, err
	}
	switch t {
	case json.Delim('{'):
		o := object{}
		for d.More() {
			k, err := d.Token()
			if err != nil {
				return nil, err
			}
			key, ok := k.(string)
			if !ok {
				return nil, fmt.Errorf("key %v is no text", k)
			}
			if _, dup := o[key]; dup {
				return nil, fmt.Errorf("key %.60q is repeated", key)
			}
			if o[key], err = jsonValue(d, depth+1); err != nil {
				return nil, err
			}
		}
		_, err := d.Token()
		return o, err
	case json.Delim('['):
		list := []any{}
		for d.More() {
			v, err := jsonValue(d, depth+1)
			if err != nil {
				return nil, err
			}
			list = append(list, v)
		}
		_, err := d.Token()
		return list, err
	}
	return t, nil
}

// What the accessors below find of the wrong type is as good as absent;
// whoever needs a field says so where it is missing.

func (o object) text(key string) string {
	s, _ := o[key].(string)
	return s
}

func (o object) object(key string) object {
	v, _ := o[key].(object)
	return v
}

func (o object) list(key string) []any {
	v, _ := o[key].([]any)
	return v
}

// objects are the objects of a list; ok is false if it holds anything else.
func (o object) objects(key string) (list []object, ok bool) {
	for _, v := range o.list(key) {
		m, isObject := v.(object)
		if !isObject {
			return nil, false
		}
		list = append(list, m)
	}
	_, isList := o[key].([]any)
	return list, isList || o[key] == nil
}

// texts are the texts of a list; ok is false if it holds anything else.
func (o object) texts(key string) (list []string, ok bool) {
	for _, v := range o.list(key) {
		s, isText := v.(string)
		if !isText {
			return nil, false
		}
		list = append(list, s)
	}
	_, isList := o[key].([]any)
	return list, isList || o[key] == nil
}

// number is a whole number that is not negative; -1 is none.
func (o object) number(key string) int {
	n, ok := o[key].(json.Number)
	if !ok {
		return -1
	}
	i, err := n.Int64()
	if err != nil || i < 0 || i > 1<<31 {
		return -1
	}
	return int(i)
}
