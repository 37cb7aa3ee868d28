package main

import (
	"net/http/httptest"
	"testing"
)

func get(path string) (int, string) {
	w := httptest.NewRecorder()
	handler().ServeHTTP(w, httptest.NewRequest("GET", path, nil))
	return w.Code, w.Body.String()
}

func TestHealth(t *testing.T) {
	if code, _ := get("/healthz"); code != 200 {
		t.Errorf("status %d", code)
	}
}

func TestHello(t *testing.T) {
	for _, path := range []string{"/hello", "/hello?x=y"} {
		t.Run(path, func(t *testing.T) {
			if _, body := get(path); body != greeting {
				t.Errorf("said %q", body)
			}
		})
	}
}

func TestUnknown(t *testing.T) {
	if code, _ := get("/nothing"); code != 404 {
		t.Errorf("status %d", code)
	}
}
