package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"go.yaml.in/yaml/v3"

	"ringwall/internal/errs"
	"ringwall/test/vm"
)

// protectScript puts Ringwall in force in the guest the way that an operator
// does, and waits until it says that it enforces.
const protectScript = `cp /payload/ringwall /usr/bin/ringwall
cp -a /payload/state /var/lib/ringwall
ringwall -q host install || exit 1
systemctl daemon-reload
systemctl start --no-block ringwall-agent
i=0
until ringwall status >/dev/null 2>&1; do
	i=$((i + 1))
	[ $i -lt 240 ] || { ringwall status; journalctl -u ringwall-agent -n 40 --no-pager; exit 1; }
	sleep 1
done
ringwall status
ringwall -q host measure /payload/authorised
`

// protectedOptions tell the evaluator where Ringwall keeps things in the guest.
const protectedOptions = `-events /var/lib/ringwall/events/events.jsonl -rollback "ringwall host apply /payload/old.policy.json" `

// protect adds to the kit a binary and the state of a host whose policy is
// docs/examples/PROFILE.yaml: the packages of the image by package trust, the
// evaluator and its tools as a signed release. Authorities are made anew, and
// the example's own software is left out.
func protect(ctx context.Context, kit, profile string, image vm.Image) error {
	work, err := os.MkdirTemp("", "attack-protect-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	p := protector{ctx: ctx, kit: kit, dir: work, ringwall: filepath.Join(kit, "ringwall")}
	if err := errors.Join(p.command("./build", p.ringwall), p.releaseKit()); err != nil {
		return err
	}
	// an attacker would like to have the first one back
	for epoch, name := range map[int]string{1: "old", 2: "strict"} {
		raw, err := p.policy(profile, epoch)
		if err != nil {
			return fmt.Errorf("policy: %w", err)
		}
		if err := os.WriteFile(p.path(name+".yaml"), raw, 0o600); err != nil {
			return err
		}
		if err := p.command(p.ringwall, "-q", "policy", "sign", p.path(name+".yaml"), "--keys", p.path("keys"), "-o", p.path(name+".policy.json")); err != nil {
			return err
		}
	}
	lists := p.path("root/var/lib/apt")
	if err := errors.Join(os.MkdirAll(lists, 0o755), os.Symlink(image.Lists, filepath.Join(lists, "lists"))); err != nil {
		return err
	}
	return errors.Join(
		os.Rename(p.path("old.policy.json"), filepath.Join(kit, "old.policy.json")),
		p.command(p.ringwall, "-q", "host", "init", "--state", filepath.Join(kit, "state"), "--trust", p.path("keys"),
			"--policy", p.path("strict.policy.json"), "--release", p.path("releases"), "--packages", image.Debs, "--root", p.path("root")))
}

type protector struct {
	ctx      context.Context
	kit, dir string
	ringwall string
}

func (p protector) path(name string) string { return filepath.Join(p.dir, name) }

func (p protector) command(argv ...string) error {
	if said, err := exec.CommandContext(p.ctx, argv[0], argv[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("%v: %w\n%s", argv, err, said)
	}
	return nil
}

// releaseKit signs what authorised.txt lists.
func (p protector) releaseKit() error {
	list, err := os.ReadFile(filepath.Join(p.kit, "authorised.txt"))
	if err != nil {
		return err
	}
	for line := range bytes.Lines(list) {
		name := string(bytes.TrimSpace(line))
		to := p.path(filepath.Join("build", name))
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		if err := os.Link(filepath.Join(p.kit, name), to); err != nil {
			return err
		}
	}
	return errors.Join(
		p.command(p.ringwall, "-q", "key", "init", p.path("keys"), "--name", "Attack"),
		p.command(p.ringwall, "-q", "sign", p.path("build"), "--keys", p.path("keys"), "--product", "kit", "--version", "1.0", "--epoch", "1", "--out", p.path("releases")))
}

// policy is the profile with this host's authorities, Debian's keyring of this
// machine, and the kit in the place of the example's own software.
func (p protector) policy(profile string, epoch int) ([]byte, error) {
	raw, err := os.ReadFile(filepath.Join("docs/examples", profile+".yaml"))
	if err != nil {
		return nil, err
	}
	var policy, own struct {
		Trust map[string]any `yaml:"trust"`
		Rest  map[string]any `yaml:",inline"`
	}
	if err := yaml.Unmarshal(raw, &policy); err != nil {
		return nil, err
	}
	said, err := exec.CommandContext(p.ctx, p.ringwall, "key", "trust", p.path("keys")).Output()
	if err != nil {
		return nil, fmt.Errorf("key trust: %w", err)
	}
	if err := yaml.Unmarshal(said, &own); err != nil {
		return nil, err
	}
	keyring, err := os.ReadFile("/usr/share/keyrings/debian-archive-keyring.gpg")
	if err != nil {
		return nil, fmt.Errorf("package debian-archive-keyring is needed: %w: %w", err, errs.Unsupported)
	}
	own.Trust["archives"] = []any{map[string]any{"name": "debian", "origins": []string{"Debian"}, "keyring": base64.StdEncoding.EncodeToString(keyring)}}
	policy.Trust = own.Trust
	policy.Rest["epoch"] = epoch
	policy.Rest["allow"] = []any{
		map[string]any{"rule": "debian", "package": map[string]any{"archive": "debian", "names": []string{"*"}}},
		map[string]any{"rule": "kit", "signer": map[string]any{"authority": "Attack build CA", "product": "kit", "min_epoch": 1}},
	}
	for _, key := range []string{"programs", "exceptions"} {
		delete(policy.Rest, key)
	}
	if profile == "server" {
		delete(policy.Rest, "deny") // the example's own software
	}
	return yaml.Marshal(policy)
}
