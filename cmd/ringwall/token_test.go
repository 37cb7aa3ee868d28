//go:build pkcs11

package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// TestToken runs what a person types whose keys are in a token.
func TestToken(t *testing.T) {
	const module = "/usr/lib/softhsm/libsofthsm2.so"
	if _, err := os.Stat(module); err != nil {
		t.Skip("SKIPPED: SoftHSM2 is not installed (apt-get install softhsm2); keys in tokens are not tested")
	}
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/token",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(e *testscript.Env) error {
			conf := filepath.Join(e.WorkDir, "softhsm2.conf")
			e.Setenv("SOFTHSM2_CONF", conf)
			e.Setenv("MODULE", module)
			tokens := filepath.Join(e.WorkDir, "tokens")
			if err := os.Mkdir(tokens, 0o700); err != nil {
				return err
			}
			return os.WriteFile(conf, []byte("directories.tokendir = "+tokens+"\nlog.level = ERROR\n"), 0o600)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"exits": exits, "json": jsonValue},
	})
}

// TestTokenDocs runs the key ceremony as the page tells it.
func TestTokenDocs(t *testing.T) {
	if _, err := exec.LookPath("softhsm2-util"); err != nil {
		t.Skip("SKIPPED: SoftHSM2 is not installed (apt-get install softhsm2); the key ceremony is not tried")
	}
	page, err := os.ReadFile("../../docs/ops/make-keys.md")
	if err != nil {
		t.Fatal(err)
	}
	dir, tokens, bin := t.TempDir(), t.TempDir(), t.TempDir()
	conf := filepath.Join(bin, "softhsm2.conf")
	for file, text := range map[string]string{
		conf:                                  fmt.Sprintf("directories.tokendir = %s\nlog.level = ERROR\n", tokens),
		filepath.Join(bin, "ringwall-pkcs11"): "#!/bin/sh\nexec ringwall \"$@\"\n",
	} {
		if err := os.WriteFile(file, []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	blocks := shellBlocks(string(page), "bash")
	if len(blocks) != 2 {
		t.Fatalf("%d blocks, want the ceremony and the adoption", len(blocks))
	}
	for _, b := range blocks {
		c := exec.CommandContext(t.Context(), "bash", "-eu", "-c", b)
		c.Dir, c.Env = dir, append(os.Environ(), "SOFTHSM2_CONF="+conf, "PATH="+bin+":"+os.Getenv("PATH"))
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s\n--- said:\n%s", err, b, out)
		}
	}
	state, err := keyState(filepath.Join(dir, "hsm", "policy-ca.key"))
	if err != nil || state != "token" {
		t.Errorf("policy-ca is %s, %v", state, err)
	}
}
