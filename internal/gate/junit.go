package gate

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"strings"
)

const maxXMLDepth = 32

// ReadJUnit reads a JUnit report, which has no specification: testsuite and
// testcase elements, at any depth. A case with failure or error failed, one
// with skipped was skipped. A suite that counts more failures or errors than
// its cases show failed as a whole.
func ReadJUnit(r io.Reader) (*Report, error) {
	j := junit{tests: tests{source: "JUnit report"}}
	// No DTD is read: encoding/xml knows only its own five entities.
	d := xml.NewDecoder(io.LimitReader(r, MaxReport))
	for {
		t, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, invalid("JUnit: %v", err)
		}
		switch t := t.(type) {
		case xml.StartElement:
			if err := j.start(t); err != nil {
				return nil, err
			}
		case xml.EndElement:
			if err := j.end(t.Name.Local); err != nil {
				return nil, err
			}
		case xml.Directive:
			return nil, invalid("JUnit: a document type is not allowed")
		}
	}
	if !j.rooted {
		return nil, invalid("JUnit: no testsuite in it")
	}
	return j.report()
}

type junit struct {
	tests
	rooted bool
	depth  int
	suites []suite
	name   string // of the case that is open
	state  string
}

type suite struct {
	name    string
	claimed int // failures and errors, by its own count
	failed  int
}

func (j *junit) start(t xml.StartElement) error {
	if j.depth++; j.depth > maxXMLDepth {
		return invalid("JUnit: nested deeper than %d", maxXMLDepth)
	}
	a := map[string]string{}
	for _, x := range t.Attr {
		a[x.Name.Local] = x.Value
	}
	switch t.Name.Local {
	case "testsuites":
		j.rooted = true
	case "testsuite":
		j.rooted = true
		s := suite{name: a["name"]}
		for _, key := range []string{"failures", "errors"} {
			n := 0
			if _, err := fmt.Sscanf(a[key], "%d", &n); err == nil && n > 0 && n < maxTests {
				s.claimed += n
			}
		}
		j.suites = append(j.suites, s)
	case "testcase":
		if j.name != "" {
			return invalid("JUnit: a testcase inside a testcase")
		}
		j.name, j.state = strings.TrimPrefix(a["classname"]+"."+a["name"], "."), outPass
		if a["name"] == "" {
			return invalid("JUnit: a testcase has no name")
		}
	case "failure", "error":
		if j.name != "" {
			j.state = outFail
		}
	case "skipped":
		if j.name != "" && j.state == outPass {
			j.state = outSkip
		}
	default:
		if j.depth == 1 {
			return invalid("JUnit: the root is %.40q, not testsuites or testsuite", t.Name.Local)
		}
	}
	return nil
}

func (j *junit) end(name string) error {
	j.depth--
	switch name {
	case "testcase":
		if j.state == outFail {
			for i := range j.suites {
				j.suites[i].failed++
			}
		}
		err := j.add(j.name, j.state)
		j.name = ""
		return err
	case "testsuite":
		s := j.suites[len(j.suites)-1]
		j.suites = j.suites[:len(j.suites)-1]
		if s.claimed > s.failed {
			return j.add(s.name+" (suite)", outFail)
		}
	}
	return nil
}
