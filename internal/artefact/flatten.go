package artefact

import (
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
)

// Layers make one file system in the way in which containerd applies them
// (image-spec, layer.md): what comes later replaces what is there, and files
// named .wh.NAME delete.

const (
	whiteout       = ".wh."
	whiteoutMeta   = ".wh..wh."
	whiteoutOpaque = ".wh..wh..opq"
	maxFollow      = 40 // links on the way to a name, as the kernel
)

// layerNode is a name of the flattened file system.
type layerNode struct {
	member   codesign.Member
	content  layerContent
	children map[string]*layerNode // of a directory
	layer    int                   // that made it
	made     bool                  // by a member of its own, not only as a parent
}

// layerContent says where content lies: the how-manieth member of which layer.
type layerContent struct{ layer, n int }

type flattener struct {
	root  *layerNode
	layer int
	gone  map[*layerNode]map[string]bool // names that this layer deletes
	count int
}

// flatten visits what a container sees. The layers are read twice, since what
// is visible is only known at the end.
func (o *ociReader) flatten(img *ociImage, prefix string, visit func(codesign.Member, io.Reader) error) error {
	f := &flattener{root: &layerNode{children: make(map[string]*layerNode)}}
	for i := range img.layers {
		f.layer, f.gone = i, make(map[*layerNode]map[string]bool)
		n := 0
		err := o.layer(&img.layers[i], func(r io.Reader) error {
			return codesign.LayerSource(r).Walk(func(m codesign.Member, _ io.Reader) error {
				n++
				return f.apply(m, layerContent{i, n})
			})
		})
		if err != nil {
			return fmt.Errorf("layer %s: %w", img.layers[i].name, err)
		}
	}
	visible := make(map[layerContent][]codesign.Member)
	var others []codesign.Member
	f.root.each(func(n *layerNode) {
		if n.member.Mode.IsRegular() {
			visible[n.content] = append(visible[n.content], n.member)
		} else {
			n.member.Origin = prefix + img.layers[n.layer].name
			others = append(others, n.member)
		}
	})
	for i := range img.layers {
		n := 0
		err := o.layer(&img.layers[i], func(r io.Reader) error {
			return codesign.LayerSource(r).Walk(func(m codesign.Member, r io.Reader) error {
				n++
				return visitNames(visible[layerContent{i, n}], prefix+img.layers[i].name, m, r, visit)
			})
		})
		if err != nil {
			return fmt.Errorf("layer %s: %w", img.layers[i].name, err)
		}
	}
	for _, m := range others {
		if err := visit(m, nil); err != nil {
			return err
		}
	}
	return nil
}

// visitNames visits content under the first of its visible names, and the
// others as links to that.
func visitNames(names []codesign.Member, origin string, found codesign.Member, r io.Reader, visit func(codesign.Member, io.Reader) error) error {
	for i, m := range names {
		m.Origin, m.Caps = origin, m.Caps || found.Caps
		m.Hard, m.Link, m.Size = i > 0, "", found.Size
		if i > 0 {
			m.Link, m.Size = names[0].Path, 0
			if err := visit(m, nil); err != nil {
				return err
			}
			continue
		}
		if err := visit(m, r); err != nil {
			return err
		}
	}
	return nil
}

// each visits everything but directories, in order of name.
func (n *layerNode) each(visit func(*layerNode)) {
	names := make([]string, 0, len(n.children))
	for name := range n.children {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		if c := n.children[name]; c.children != nil {
			c.each(visit)
		} else {
			visit(c)
		}
	}
}

// apply adds a member of the current layer.
func (f *flattener) apply(m codesign.Member, at layerContent) error {
	if f.count++; f.count > maxMembers {
		return fmt.Errorf("more than %d members: %w", maxMembers, errs.Invalid)
	}
	dir, base := path.Split(m.Path)
	parent, full, err := f.directory(strings.TrimSuffix(dir, "/"))
	if err != nil {
		return fmt.Errorf("%.200q: %w", m.Path, err)
	}
	if strings.HasPrefix(base, whiteout) {
		return f.delete(parent, base, m)
	}
	if f.gone[parent][base] {
		return fmt.Errorf("%.200q is deleted by its own layer: %w", m.Path, errs.Invalid)
	}
	m.Path = path.Join(full, base)
	old := parent.children[base]
	if old != nil && old.made && old.layer == f.layer && !(old.children != nil && m.Mode.IsDir()) {
		return fmt.Errorf("%.200q comes twice in a layer: %w", m.Path, errs.Invalid)
	}
	n := &layerNode{member: m, content: at, layer: f.layer, made: true}
	switch {
	case m.Mode.IsDir():
		if old != nil && old.children != nil { // directories are merged
			old.layer, old.made = f.layer, true
			return nil
		}
		n.children = make(map[string]*layerNode)
	case m.Hard:
		target, err := f.target(m.Link)
		if err != nil {
			return fmt.Errorf("%.200q: %w", m.Path, err)
		}
		n.content = target.content
		n.member.Caps = target.member.Caps
	}
	if old != nil && old.children != nil && old.hasLayer(f.layer) {
		return fmt.Errorf("%.200q is a file, and a directory in the same layer: %w", m.Path, errs.Invalid)
	}
	parent.children[base] = n
	return nil
}

// hasLayer says whether anything at or below n is of a layer.
func (n *layerNode) hasLayer(layer int) bool {
	if n.layer == layer && n.made {
		return true
	}
	for _, c := range n.children {
		if c.hasLayer(layer) {
			return true
		}
	}
	return false
}

// directory returns the directory at a path and its real path. Links that lower
// layers left on the way are followed, within the image; what is missing is made.
func (f *flattener) directory(p string) (*layerNode, string, error) {
	at, stack, names := f.root, []*layerNode{}, []string{}
	todo := strings.Split(p, "/")
	for follow := 0; len(todo) > 0; {
		part := todo[0]
		todo = todo[1:]
		switch part {
		case "", ".":
			continue
		case "..": // only out of links; members have none
			if len(stack) > 0 {
				at, stack, names = stack[len(stack)-1], stack[:len(stack)-1], names[:len(names)-1]
			}
			continue
		}
		next := at.children[part]
		switch {
		case next == nil:
			next = &layerNode{children: make(map[string]*layerNode), layer: f.layer}
			at.children[part] = next
		case next.member.Mode&fs.ModeSymlink != 0:
			if follow++; follow > maxFollow {
				return nil, "", fmt.Errorf("more than %d links on the way: %w", maxFollow, errs.Invalid)
			}
			target := next.member.Link
			if strings.HasPrefix(target, "/") {
				at, stack, names = f.root, stack[:0], names[:0]
			}
			todo = append(strings.Split(target, "/"), todo...)
			if len(todo) > maxPlace {
				return nil, "", fmt.Errorf("too long a way: %w", errs.Invalid)
			}
			continue
		case next.children == nil:
			return nil, "", fmt.Errorf("%.80q on the way is no directory: %w", part, errs.Invalid)
		}
		stack, names, at = append(stack, at), append(names, part), next
	}
	return at, strings.Join(names, "/"), nil
}

// target finds the file that a hard link is another name of.
func (f *flattener) target(link string) (*layerNode, error) {
	dir, base := path.Split(link)
	parent, _, err := f.directory(strings.TrimSuffix(dir, "/"))
	if err != nil {
		return nil, err
	}
	n := parent.children[base]
	if n == nil || !n.member.Mode.IsRegular() || n.children != nil {
		return nil, fmt.Errorf("a hard link to %.200q, which is no file: %w", link, errs.Invalid)
	}
	return n, nil
}

// delete applies a whiteout to what lower layers left.
func (f *flattener) delete(parent *layerNode, base string, m codesign.Member) error {
	if !m.Mode.IsRegular() || m.Hard || m.Size != 0 {
		return fmt.Errorf("%.200q: a whiteout that is no empty file: %w", m.Path, errs.Invalid)
	}
	if base == whiteoutOpaque {
		parent.forget(f.layer)
		return nil
	}
	name := strings.TrimPrefix(base, whiteout)
	if strings.HasPrefix(base, whiteoutMeta) || name == "" || name == "." || name == ".." {
		return fmt.Errorf("%.200q: unknown whiteout: %w", m.Path, errs.Invalid)
	}
	if old := parent.children[name]; old != nil && old.hasLayer(f.layer) {
		return fmt.Errorf("%.200q deletes what its own layer has: %w", m.Path, errs.Invalid)
	}
	if f.gone[parent] == nil {
		f.gone[parent] = make(map[string]bool)
	}
	f.gone[parent][name] = true
	delete(parent.children, name)
	return nil
}

// forget drops what is not of a layer.
func (n *layerNode) forget(layer int) {
	for name, c := range n.children {
		switch {
		case !c.hasLayer(layer):
			delete(n.children, name)
		case c.children != nil:
			c.forget(layer)
		}
	}
}
