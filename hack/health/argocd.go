package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	lua "github.com/yuin/gopher-lua"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

const healthKey = "resource.customizations.health.finetune.dev_FineTuneJob"

type health struct {
	Status  string `json:"status"`
	Message string `json:"message"`
}

// What Argo CD takes for a health; of anything else it says Unknown.
var known = map[string]bool{
	"Healthy": true, "Suspended": true, "Progressing": true, "Missing": true, "Degraded": true, "Unknown": true,
}

func readScript(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	var config corev1.ConfigMap
	if err := yaml.UnmarshalStrict(text, &config); err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	script := config.Data[healthKey]
	if script == "" {
		return "", fmt.Errorf("%s: no data.%q", path, healthKey)
	}
	return script, nil
}

// resourceHealth does what Argo CD does around a health check. Argo CD itself is too large a module to import: the
// interpreter is the one it uses, with fewer libraries than it opens (it adds a reduced `os`), and a second to answer.
func resourceHealth(document *unstructured.Unstructured, script string) (*health, error) {
	if document.GetDeletionTimestamp() != nil {
		return &health{Status: "Progressing", Message: "Pending deletion"}, nil
	}
	state := lua.NewState(lua.Options{SkipOpenLibs: true})
	defer state.Close()
	libraries := map[string]lua.LGFunction{lua.LoadLibName: lua.OpenPackage, lua.BaseLibName: lua.OpenBase, lua.TabLibName: lua.OpenTable}
	for _, name := range []string{lua.LoadLibName, lua.BaseLibName, lua.TabLibName} {
		opening := lua.P{Fn: state.NewFunction(libraries[name]), NRet: 0, Protect: true}
		if err := state.CallByParam(opening, lua.LString(name)); err != nil {
			return nil, err
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	state.SetContext(ctx)
	state.SetGlobal("obj", value(state, document.Object))
	if err := state.DoString(script); err != nil {
		return nil, err
	}
	table, ok := state.Get(-1).(*lua.LTable)
	if !ok {
		return nil, errors.New("the health check returns no table")
	}
	found := &health{Status: lua.LVAsString(table.RawGetString("status")), Message: lua.LVAsString(table.RawGetString("message"))}
	if !known[found.Status] {
		return nil, fmt.Errorf("the health check returns status %q, which Argo CD does not know", found.Status)
	}
	return found, nil
}

// value is what a part of a document is in Lua; null is nil.
func value(state *lua.LState, part any) lua.LValue {
	switch part := part.(type) {
	case bool:
		return lua.LBool(part)
	case string:
		return lua.LString(part)
	case int64:
		return lua.LNumber(part)
	case float64:
		return lua.LNumber(part)
	case []any:
		table := state.NewTable()
		for _, item := range part {
			table.Append(value(state, item))
		}
		return table
	case map[string]any:
		table := state.NewTable()
		for key, item := range part {
			table.RawSetString(key, value(state, item))
		}
		return table
	}
	return lua.LNil
}
