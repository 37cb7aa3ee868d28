package agent

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"ringwall/internal/enforce"
	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/integrity"
)

// Python keeps compiled modules beside their sources. They are made on the host
// and no package lists them, so the kernel refuses them and Python compiles each
// source again at each start. The agent makes them itself: docs/adr/0007.

// fileModules is what was made, in the run directory.
const fileModules = "bytecode.json"

// Bounds of compiling.
const (
	maxModules    = 100_000
	maxModuleFile = 128 << 20
	batchModules  = 1000
	batchBytes    = 32 << 20 // of byte code that waits to be authorised
	lookEvery     = 30 * time.Second
)

// moduleSource is one package's word about a Python source.
type moduleSource struct {
	digest integrity.Digest
	origin integrity.Origin
}

// module is byte code that the agent made. It is authorised as what its
// source's package brought, for as long as the source is.
type module struct {
	Source       string           `json:"source"`
	SourceDigest integrity.Digest `json:"source_digest"`
	SourceStamp  host.Stamp       `json:"source_stamp"`
	Path         string           `json:"path"`
	Digest       integrity.Digest `json:"digest"`
	Stamp        host.Stamp       `json:"stamp"`
	Archive      string           `json:"archive"`
	Package      string           `json:"package"`
	Version      string           `json:"version"`
}

func (m *module) origin() integrity.Origin {
	return integrity.Origin{Archive: m.Archive, Package: m.Package, Version: m.Version}
}

// moduleSources are modules as the evaluator takes content: so a policy's rules
// about a package hold for its byte code as for its sources.
func moduleSources(made map[string]module) []integrity.Source {
	by := map[integrity.Origin][]module{}
	for _, m := range made {
		by[m.origin()] = append(by[m.origin()], m)
	}
	var out []integrity.Source
	for o, list := range by {
		out = append(out, integrity.Source{Origin: o, Files: func(yield func(integrity.File) bool) {
			for i := range list {
				f := integrity.File{SHA256: list[i].Digest, Kinds: integrity.SetOf(integrity.KindScript), Names: []string{list[i].Path[1:]}}
				if !yield(f) {
					return
				}
			}
		}})
	}
	return out
}

// notePython remembers a package's Python sources, and Python itself, as they pass.
func (l *loaded) notePython(f *integrity.File, o integrity.Origin) {
	for _, n := range f.Names {
		switch {
		case f.Kinds.Has(integrity.KindScript) && strings.HasSuffix(n, ".py"):
			l.python["/"+n] = append(l.python["/"+n], moduleSource{f.SHA256, o})
		case f.Kinds.Has(integrity.KindExec) && isPython("/"+n):
			l.python["/"+n] = append(l.python["/"+n], moduleSource{f.SHA256, o})
		}
	}
}

// isPython says whether a path is that of a Python with its version, as
// /usr/bin/python3.11.
func isPython(path string) bool {
	minor, ok := strings.CutPrefix(path, "/usr/bin/python3.")
	return ok && minor != "" && strings.Trim(minor, "0123456789") == ""
}

// authorised finds the package that brought content to a path, if the policy in
// force authorises it.
func (l *loaded) authorised(path string, d integrity.Digest, k integrity.Kind) (moduleSource, bool) {
	if l.compiled.Table.Allows(integrity.Key{Digest: d}, k) {
		for _, s := range l.python[path] {
			if s.digest == d {
				return s, true
			}
		}
	}
	return moduleSource{}, false
}

// keepModules takes those of made whose source the policy still authorises, and
// says whether there are others.
func (l *loaded) keepModules(made map[string]module) (others bool) {
	l.modules = make(map[string]module, len(made))
	for k, m := range made {
		if _, ok := l.authorised(m.Source, m.SourceDigest, integrity.KindScript); ok {
			l.modules[k] = m
			l.scripts = append(l.scripts, m.Path)
		}
	}
	return len(l.modules) < len(made)
}

// BytecodeStatus says how far Python's byte code is made.
type BytecodeStatus struct {
	State   string `json:"state"` // off, waiting, compiling, done
	Why     string `json:"why,omitempty"`
	Made    int    `json:"made"`
	Pending int    `json:"pending"`
	// Left are sources that do not compile, or are not as their package has
	// them; Python reads those as it did.
	Left int `json:"left"`
}

// States of BytecodeStatus.
const (
	bytecodeOff       = "off"
	bytecodeWaiting   = "waiting"
	bytecodeCompiling = "compiling"
	bytecodeDone      = "done"
)

// bytecode compiles in the background. Its fields belong to its goroutine,
// except status, which Agent.mu is over.
type bytecode struct {
	a      *Agent
	log    *slog.Logger
	lib    string // where the interpreters' libraries are
	status BytecodeStatus
	left   map[string]host.Stamp // sources that were tried and left
	under  integrity.Digest      // the policy under which they were
}

// run compiles what is missing until ctx ends.
func (b *bytecode) run(ctx context.Context) {
	next := time.NewTimer(0)
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-next.C:
		}
		if err := b.pass(ctx); err != nil && ctx.Err() == nil {
			b.log.WarnContext(ctx, "compile Python's byte code", slog.Any("error", err))
			b.tell(bytecodeWaiting, err.Error())
		}
		next.Reset(lookEvery)
	}
}

func (b *bytecode) tell(state, why string) {
	b.a.mu.Lock()
	defer b.a.mu.Unlock()
	b.status.State, b.status.Why = state, why
}

// pass brings byte code up to date once.
func (b *bytecode) pass(ctx context.Context) error {
	l, regime, why := b.ready()
	if why != "" {
		b.tell(bytecodeWaiting, why)
		return nil
	}
	if l.signed.Digest != b.under {
		b.left, b.under = map[string]host.Stamp{}, l.signed.Digest
	}
	todo := b.missing(l)
	b.count(len(todo))
	w := &pythons{a: b.a, l: l, running: map[string]*host.PythonCompiler{}}
	defer w.close()
	for len(todo) > 0 {
		made, rest, err := b.compile(ctx, w, todo)
		if err == nil {
			err = b.commit(ctx, regime, made)
		}
		if err != nil {
			return err
		}
		todo = rest
		b.count(len(todo))
	}
	return nil
}

func (b *bytecode) count(pending int) {
	b.a.mu.Lock()
	defer b.a.mu.Unlock()
	s := BytecodeStatus{State: bytecodeDone, Made: len(b.a.loaded.modules), Pending: pending, Left: len(b.left)}
	if pending > 0 {
		s.State = bytecodeCompiling
	}
	b.status = s
}

// ready gives the policy to compile under, or why nothing can be compiled now.
// regime changes when what shielded the compiler may have ended.
func (b *bytecode) ready() (l *loaded, regime uint64, why string) {
	if pid, err := host.DpkgBusy("/"); err == nil && pid != 0 {
		return nil, 0, "packages are being installed"
	}
	b.a.mu.Lock()
	defer b.a.mu.Unlock()
	return b.a.loaded, b.a.regime, b.a.unshielded()
}

// unshielded says why a process of root's could reach into a compiler of byte
// code; "" if none can. What such a compiler makes would be authorised code of
// whoever reached in: this fails closed. a.mu is held.
func (a *Agent) unshielded() string {
	if a.loaded == nil {
		return "no policy is in force"
	}
	t := a.loaded.compiled.Table
	reads := slices.ContainsFunc(t.Interpreters, func(i integrity.Interpreter) bool { return slices.Contains(i.Bytecode, ".pyc") })
	enforced := t.Process.Memory == integrity.ModeEnforce && t.Process.Ptrace == integrity.ModeEnforce && t.Process.CodeWrites == integrity.ModeEnforce
	for _, k := range []integrity.Kind{integrity.KindExec, integrity.KindLibrary, integrity.KindScript} {
		enforced = enforced && t.Modes[k] == integrity.ModeEnforce
	}
	switch st, err := a.watcher.Status(); {
	case !reads:
		return "no interpreter of the policy has byte code of its own (key bytecode)"
	case !enforced:
		return "the policy does not enforce for programs, libraries, scripts and processes: others could reach into the compiler"
	case !a.canary.OK:
		return "enforcement is not proven"
	case err != nil:
		return err.Error()
	case st.RelaxedUntil > st.Now:
		return "a break-glass permit is in force"
	}
	return ""
}

// missing lists the sources that have byte code on the disk other than the
// agent's.
func (b *bytecode) missing(l *loaded) []string {
	var out []string
	for path := range l.python {
		program := b.pythonFor(path)
		name := host.BytecodePath(path, pythonTag(program))
		if name == "" || l.python[program] == nil {
			continue
		}
		st, err := host.StampOf(path)
		if err != nil || b.left[path] == st {
			continue
		}
		now, err := host.StampOf(name)
		m, made := l.modules[name]
		if err != nil && !made || made && m.SourceStamp == st && m.Stamp == now {
			continue // Python never compiled it, or it is done
		}
		out = append(out, path)
	}
	slices.Sort(out)
	return out
}

// pythonFor says which Python reads a source: the one whose library it is in,
// or the one that /usr/bin/python3 is.
func (b *bytecode) pythonFor(path string) string {
	if rest, ok := strings.CutPrefix(path, b.lib+"/"); ok {
		if dir, _, _ := strings.Cut(rest, "/"); isPython("/usr/bin/" + dir) {
			return "/usr/bin/" + dir
		}
	}
	name, _ := os.Readlink("/usr/bin/python3") // no link: no default
	return filepath.Join("/usr/bin", name)
}

// pythonTag is cpython-311 for /usr/bin/python3.11.
func pythonTag(program string) string {
	return "cpython-" + strings.ReplaceAll(strings.TrimPrefix(filepath.Base(program), "python"), ".", "")
}

// work is byte code that is not yet authorised.
type work struct {
	module
	source *host.PythonSource
	data   []byte
}

// compile makes the first of todo and returns the others.
func (b *bytecode) compile(ctx context.Context, w *pythons, todo []string) (made []work, rest []string, err error) {
	size := 0
	for i, path := range todo {
		if ctx.Err() != nil || len(made) == batchModules || size > batchBytes {
			return made, todo[i:], ctx.Err()
		}
		s, err := host.ReadPython(path)
		if err != nil {
			b.leave(ctx, path, err)
			continue
		}
		by, ok := w.l.authorised(path, s.Digest, integrity.KindScript)
		if !ok {
			b.left[path] = s.Stamp
			continue
		}
		c, err := w.python(ctx, b.pythonFor(path))
		if err != nil {
			return nil, nil, err
		}
		code, err := c.Compile(ctx, path, s.Text)
		if errors.Is(err, errs.Invalid) {
			b.left[path] = s.Stamp // Python's own test cases, and the like
			continue
		}
		if err != nil {
			return nil, nil, err
		}
		x := work{source: s, data: host.Bytecode(c.Magic, s, code)}
		x.module = module{
			Source: path, SourceDigest: s.Digest, SourceStamp: s.Stamp, Path: host.BytecodePath(path, c.Tag), Digest: sha256.Sum256(x.data),
			Archive: by.origin.Archive, Package: by.origin.Package, Version: by.origin.Version,
		}
		size += len(x.data)
		made = append(made, x)
	}
	return made, nil, nil
}

// leave gives a source up, as it is now.
func (b *bytecode) leave(ctx context.Context, path string, why error) {
	b.log.WarnContext(ctx, "left to Python", slog.String("source", path), slog.Any("error", why))
	if st, err := host.StampOf(path); err == nil {
		b.left[path] = st
	}
}

// commit authorises what was made and puts it in its place. What was made under
// another policy, or from a source that has changed, is thrown away.
func (b *bytecode) commit(ctx context.Context, regime uint64, batch []work) error {
	a := b.a
	a.mu.Lock()
	defer a.mu.Unlock()
	if why := a.unshielded(); a.regime != regime || why != "" {
		return fmt.Errorf("the policy or its enforcement changed meanwhile; what was compiled is thrown away: %w", errs.Conflict)
	}
	if len(batch) == 0 {
		return nil
	}
	made := maps.Clone(a.loaded.modules)
	for _, x := range batch {
		if !x.source.Changed() && len(made) < maxModules {
			made[x.Path] = x.module
		}
	}
	l, err := a.state.load(a.loaded.bundle, a.compileOptions(), made)
	if err != nil {
		return err
	}
	if err := a.enact(ctx, l); err != nil {
		return err
	}
	for _, x := range batch {
		m, ok := l.modules[x.Path]
		if !ok || m.Digest != x.Digest || !l.compiled.Table.Allows(integrity.Key{Digest: x.Digest}, integrity.KindScript) {
			b.left[x.Source] = x.SourceStamp
			continue
		}
		if m.Stamp, err = host.WriteBytecode(x.Path, x.data); err != nil {
			b.left[x.Source] = x.SourceStamp
			b.log.WarnContext(ctx, "Python's byte code", slog.Any("error", err))
			continue
		}
		l.modules[x.Path] = m
		a.measurer.expect([]string{x.Path})
	}
	return a.saveModules()
}

// modules are those of the policy in force. a.mu is held.
func (a *Agent) modules() map[string]module {
	if a.loaded == nil {
		return nil
	}
	return a.loaded.modules
}

// saveModules keeps what was made for the next agent until the next boot.
func (a *Agent) saveModules() error {
	b, err := json.Marshal(slices.Collect(maps.Values(a.loaded.modules)))
	if err != nil {
		return err
	}
	return host.WriteFile(filepath.Join(a.opts.RunDir, fileModules), b, 0o600)
}

// recallModules reads what an agent before this one made since the boot. It
// is believed only if the run directory has been guarded in the kernel all
// along, which only an agent can have asked for; otherwise it is made again.
func (a *Agent) recallModules() map[string]module {
	st, err := a.watcher.Status()
	if err != nil || !st.Protected {
		return nil
	}
	if mine, err := a.enforcer.IsGuarded(a.opts.RunDir); err != nil || !mine {
		return nil
	}
	b, err := readFile(filepath.Join(a.opts.RunDir, fileModules), maxModuleFile)
	if err != nil {
		return nil
	}
	var list []module
	if err := json.Unmarshal(b, &list); err != nil || len(list) > maxModules {
		return nil
	}
	out := make(map[string]module, len(list))
	for _, m := range list {
		if strings.HasPrefix(m.Path, "/") && !m.Digest.IsZero() {
			out[m.Path] = m
		}
	}
	return out
}

// pythons are the interpreters of one pass.
type pythons struct {
	a       *Agent
	l       *loaded
	running map[string]*host.PythonCompiler
}

func (w *pythons) close() {
	for _, c := range w.running {
		c.Close()
	}
}

func (w *pythons) python(ctx context.Context, program string) (*host.PythonCompiler, error) {
	if c := w.running[program]; c != nil {
		return c, nil
	}
	h, err := w.home(ctx, program)
	if err != nil {
		return nil, fmt.Errorf("a home for %s: %w", program, err)
	}
	if scope := w.a.state.Settings().Scope; scope != "" {
		// where the policy holds for it, too
		if h.Cgroup, err = os.Open(scope); err != nil {
			return nil, err
		}
		defer h.Cgroup.Close()
	}
	c, err := host.StartPython(ctx, h)
	if err != nil {
		return nil, err
	}
	if c.Tag != pythonTag(program) {
		c.Close()
		return nil, fmt.Errorf("%s names its byte code %s: %w", program, c.Tag, errs.Unsupported)
	}
	w.running[program] = c
	return c, nil
}

// home makes the directory that an interpreter takes for its installation:
// guarded, and with nothing in it but what packages brought under these very
// names. So no file that is authorised for something else gets into its way.
func (w *pythons) home(ctx context.Context, program string) (host.PythonHome, error) {
	version := filepath.Base(program)
	h := host.PythonHome{Program: program, Home: filepath.Join(w.a.opts.RunDir, version)}
	b, err := os.ReadFile(program)
	if err != nil {
		return h, err
	}
	h.Digest = sha256.Sum256(b)
	if _, ok := w.l.authorised(program, h.Digest, integrity.KindExec); !ok {
		return h, fmt.Errorf("it is not as its package has it: %w", errs.Untrusted)
	}
	lib := filepath.Join(h.Home, "lib", version)
	if err := w.guardHome(h.Home, filepath.Join(h.Home, "lib"), lib, filepath.Join(lib, "lib-dynload"), filepath.Join(lib, "encodings")); err != nil {
		return h, err
	}
	for _, n := range host.HomeFiles() {
		from := filepath.Join(w.a.bytecode.lib, version, n)
		s, err := host.ReadPython(from)
		if errors.Is(err, errs.NotFound) {
			continue
		}
		if err != nil {
			return h, err
		}
		if _, ok := w.l.authorised(from, s.Digest, integrity.KindScript); !ok {
			return h, fmt.Errorf("%s is not as its package has it: %w", from, errs.Untrusted)
		}
		if err := host.WriteFile(filepath.Join(lib, n), s.Text, 0o644); err != nil {
			return h, err
		}
	}
	if err := host.WriteFile(filepath.Join(h.Home, "compile.py"), []byte(host.PythonScript()), 0o644); err != nil {
		return h, err
	}
	_, err = w.a.measurer.tree(ctx, h.Home)
	return h, err
}

// guardHome makes directories that only the agent can change, the first one
// holding the others. One that an agent guarded since the boot is kept; any
// other may hold anything.
func (w *pythons) guardHome(dirs ...string) error {
	a := w.a
	if _, err := os.Lstat(dirs[0]); err == nil {
		if mine, err := a.enforcer.IsGuarded(dirs[len(dirs)-1]); err == nil && mine {
			return nil
		}
	}
	if err := os.RemoveAll(dirs[0]); err != nil {
		return err
	}
	for i, d := range dirs {
		if err := errors.Join(os.Mkdir(d, 0o755), os.Chmod(d, 0o755)); err != nil { //nolint:gosec // for another user to read
			return err
		}
		// each before the next one is in it; the last one says that all are
		if err := a.enforcer.Guard(d); err != nil {
			return err
		}
		if es, err := os.ReadDir(d); err != nil || len(es) > 0 {
			return errors.Join(err, fmt.Errorf("%s, level %d: somebody writes there: %w", d, i, errs.Conflict))
		}
	}
	return nil
}

// compileOptions are what this host adds to a policy.
func (a *Agent) compileOptions() integrity.CompileOptions {
	return integrity.CompileOptions{
		Self: a.self, SelfVerity: a.verity, Canary: enforce.CanaryDigest(), Script: sha256.Sum256([]byte(host.PythonScript())), Now: a.clock.now(),
	}
}
