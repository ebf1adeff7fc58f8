package main

import (
	"io"
	"os"
	"strings"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	"k8s.io/cli-runtime/pkg/resource"
	"k8s.io/client-go/dynamic/fake"
	"k8s.io/kubectl/pkg/cmd/wait"
)

var resourceOf = schema.GroupVersionResource{Group: "finetune.dev", Version: "v1alpha1", Resource: "finetunejobs"}

// waits are kubectl wait's own options, by what it is to wait for.
type waits map[string]*wait.WaitOptions

func newWaits(conditions []string) (waits, error) {
	nowhere, nothing := "https://127.0.0.1:1", os.DevNull
	config := genericclioptions.NewConfigFlags(false)
	config.APIServer, config.KubeConfig = &nowhere, &nothing
	made := waits{}
	for _, condition := range conditions {
		flags := wait.NewWaitFlags(config, genericiooptions.IOStreams{Out: io.Discard, ErrOut: io.Discard})
		flags.ForCondition = condition
		flags.Timeout = 0 // look once
		options, err := flags.ToOptions(nil)
		if err != nil {
			return nil, err
		}
		made[condition] = options
	}
	return made, nil
}

// over says of each condition whether kubectl wait would return at once. The command is kubectl's, its client a fake one
// that holds the document.
func (w waits) over(document *unstructured.Unstructured) (map[string]bool, error) {
	lists := map[schema.GroupVersionResource]string{resourceOf: "FineTuneJobList"}
	client := fake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), lists, document.DeepCopy())
	finder := genericclioptions.NewSimpleFakeResourceFinder(&resource.Info{
		Mapping:   &meta.RESTMapping{Resource: resourceOf},
		Namespace: document.GetNamespace(),
		Name:      document.GetName(),
	})
	found := map[string]bool{}
	for condition, options := range w {
		options.DynamicClient, options.ResourceFinder = client, finder
		err := options.RunWait()
		if err != nil && !strings.HasPrefix(err.Error(), "condition not met") {
			return nil, err
		}
		found[condition] = err == nil
	}
	return found, nil
}
