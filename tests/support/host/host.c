// A host that is not Python: it embeds the interpreter as PythonKit does, without headers, and drives the bridge.
//
//   host LIBPYTHON PATHS FOLDER STREAMS ENDING
//
// PATHS are site-packages, set off by ':'. What was seen is written to FOLDER/report as `name value` lines.
// ENDING: finalize (with a model open and streams under way), exit (with a model open, not finalized), closed.
// The first thread initializes Python and keeps the GIL: others run only while it waits in a call.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

typedef struct Object Object;

// The functions of Python's C interface that are used, by their names there.
#define API(X) \
    X(void, Py_Initialize, (void)) \
    X(int, Py_FinalizeEx, (void)) \
    X(int, PyRun_SimpleString, (const char *)) \
    X(Object *, PyImport_ImportModule, (const char *)) \
    X(Object *, PyObject_GetAttrString, (Object *, const char *)) \
    X(Object *, PyObject_Call, (Object *, Object *, Object *)) \
    X(Object *, PyObject_CallObject, (Object *, Object *)) \
    X(Object *, PyObject_GetIter, (Object *)) \
    X(Object *, PyIter_Next, (Object *)) \
    X(Object *, PyObject_GetItem, (Object *, Object *)) \
    X(int, PyObject_IsTrue, (Object *)) \
    X(Object *, PyErr_Occurred, (void)) \
    X(void, PyErr_Print, (void)) \
    X(Object *, PyTuple_New, (long)) \
    X(Object *, PyList_New, (long)) \
    X(int, PyList_Append, (Object *, Object *)) \
    X(Object *, PyDict_New, (void)) \
    X(int, PyDict_SetItemString, (Object *, const char *, Object *)) \
    X(Object *, PyUnicode_FromString, (const char *)) \
    X(const char *, PyUnicode_AsUTF8, (Object *)) \
    X(Object *, PyBytes_FromString, (const char *)) \
    X(Object *, PyLong_FromLongLong, (long long)) \
    X(long long, PyLong_AsLongLong, (Object *)) \
    X(Object *, PyFloat_FromDouble, (double)) \
    X(Object *, PyBool_FromLong, (long)) \
    X(void, Py_DecRef, (Object *)) \
    X(int, PyGILState_Ensure, (void)) \
    X(void, PyGILState_Release, (int)) \
    X(void *, PyEval_SaveThread, (void)) \
    X(void, PyEval_RestoreThread, (void *))

#define DECLARE(result, name, parameters) static result(*name) parameters;
API(DECLARE)

static FILE *report;
static Object *bridge;

static void say(const char *name, double value) {
    fprintf(report, "%s %.6g\n", name, value);
    fflush(report);
}

// A test that hangs, or an exception that crossed, ends the host: what Swift's `try!` would do.
static void die(const char *what) {
    fprintf(report, "died %s\n", what);
    fflush(report);
    if (PyErr_Occurred && PyErr_Occurred()) PyErr_Print();
    _exit(70);
}

static Object *must(Object *object, const char *what) {
    if (object == NULL || PyErr_Occurred()) die(what);
    return object;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// References that are kept for long after their call, the oldest thousands of calls, as ARC may do.
#define KEPT 4096
static Object *kept[KEPT];
static int next_kept;

static Object *keep(Object *object) {
    int place = next_kept++ % KEPT;
    if (kept[place] != NULL) Py_DecRef(kept[place]);
    return kept[place] = object;
}

static void drop_kept(void) {
    for (int i = 0; i < KEPT; i++) {
        int place = (i * 1031) % KEPT;  // in another order than they came
        if (kept[place] != NULL) Py_DecRef(kept[place]);
        kept[place] = NULL;
    }
}

// The longest time of each function, in seconds.
static struct { const char *name; double longest; } times[16];

static void note(const char *name, double seconds) {
    for (int i = 0; i < 16; i++) {
        if (times[i].name == NULL) times[i].name = name;
        if (strcmp(times[i].name, name) == 0) {
            if (seconds > times[i].longest) times[i].longest = seconds;
            return;
        }
    }
}

// call("start", "handle", integer(h), ..., NULL): keyword arguments, whose references it takes. The result is kept.
static Object *call(const char *name, ...) {
    Object *function = must(PyObject_GetAttrString(bridge, name), name);
    Object *arguments = must(PyDict_New(), name);
    va_list list;
    va_start(list, name);
    for (const char *key; (key = va_arg(list, const char *)) != NULL;) {
        Object *value = va_arg(list, Object *);
        PyDict_SetItemString(arguments, key, value);
        Py_DecRef(value);
    }
    va_end(list);
    Object *none = must(PyTuple_New(0), name);
    double begun = now();
    Object *result = must(PyObject_Call(function, none, arguments), name);
    note(name, now() - begun);
    Py_DecRef(none);
    Py_DecRef(arguments);
    Py_DecRef(function);
    return keep(result);
}

static Object *text(const char *value) { return must(PyUnicode_FromString(value), "text"); }
static Object *integer(long long value) { return must(PyLong_FromLongLong(value), "integer"); }
static Object *number(double value) { return must(PyFloat_FromDouble(value), "number"); }

// dict[key], by the protocol that Swift's subscript uses; kept.
static Object *item(Object *dict, const char *key) {
    Object *name = text(key);
    Object *value = must(PyObject_GetItem(dict, name), key);
    Py_DecRef(name);
    return keep(value);
}

static int is_ok(Object *result) { return PyObject_IsTrue(item(result, "ok")); }
static long long integer_in(Object *dict, const char *key) { return PyLong_AsLongLong(item(dict, key)); }
static const char *text_in(Object *dict, const char *key) { return PyUnicode_AsUTF8(item(dict, key)); }

// Walk over a dictionary by its `items` attribute, as a `for` loop in Swift does; the number of its entries.
static int entries(Object *dict) {
    Object *items = must(PyObject_GetAttrString(dict, "items"), "items");
    Object *view = must(PyObject_CallObject(items, NULL), "items()");
    Object *iterator = must(PyObject_GetIter(view), "iter");
    int count = 0;
    for (Object *entry; (entry = PyIter_Next(iterator)) != NULL; count++) Py_DecRef(entry);
    if (PyErr_Occurred()) die("iteration");
    Py_DecRef(iterator);
    Py_DecRef(view);
    Py_DecRef(items);
    return count;
}

static int refused;

static void refuse(Object *result) {
    if (is_ok(result)) die("what is wrong was taken");
    if (entries(item(result, "error")) != 3) die("an error that says too little");
    refused++;
}

// Pull a stream to its last event, and cancel it after `most` pieces of text (-1: never); the last event.
static Object *pull(long long stream, int most) {
    int pieces = 0;
    double begun = now();
    for (;;) {
        Object *result = call("next_event", "stream", integer(stream), "timeout_seconds", number(0.05), NULL);
        if (!is_ok(result)) die("a pull failed");
        Object *event = item(result, "event");
        if (now() - begun > 60) die("a stream hangs");
        if (!PyObject_IsTrue(event)) continue;  // None
        if (entries(event) < 2) die("an event that says too little");
        const char *kind = text_in(event, "kind");
        if (strcmp(kind, "done") == 0 || strcmp(kind, "ready") == 0 || strcmp(kind, "error") == 0) return event;
        if (strcmp(kind, "progress") != 0 && ++pieces == most) {
            if (!is_ok(call("cancel", "stream", integer(stream), NULL))) die("cancelling failed");
        }
    }
}

static Object *question(int i) {
    static const char *questions[] = {"What is 48 + 76?", "How many r's are in strawberry?", "What is 7 * 8?"};
    if (i % 2) return text(questions[i % 3]);
    Object *message = must(PyDict_New(), "message"), *role = text("user"), *content = text(questions[i % 3]);
    PyDict_SetItemString(message, "role", role);
    PyDict_SetItemString(message, "content", content);
    Object *messages = must(PyList_New(0), "messages");
    PyList_Append(messages, message);
    Py_DecRef(role);
    Py_DecRef(content);
    Py_DecRef(message);
    return messages;
}

static long long load(const char *path) {
    Object *result = call("load", "path", text(path), NULL);
    if (!is_ok(result)) die("load failed");
    long long handle = integer_in(result, "handle");
    Object *last = pull(integer_in(result, "stream"), -1);
    if (strcmp(text_in(last, "kind"), "ready") != 0) die(text_in(last, "message"));
    return handle;
}

static long long begin(long long handle, int i, double temperature) {
    Object *result = call("start", "handle", integer(handle), "messages", question(i), "temperature", number(temperature),
                          "seed", integer(i), "on_loop", text("ignore"), NULL);
    if (!is_ok(result)) die("start failed");
    return integer_in(result, "stream");
}

// Streams one after the other, one in ten cancelled in its middle; how many of them ended so.
static int streams(long long handle, int count, const char *name) {
    int stopped = 0, cancelled = 0;
    for (int i = 0; i < count; i++) {
        int is_cut = i % 10 == 5;  // of a reply that would go on to the end of the context
        const char *reason = text_in(pull(begin(handle, i, is_cut ? 9 : 0), is_cut ? 1 + i % 7 : -1), "finish_reason");
        stopped += strcmp(reason, "stop") == 0;
        cancelled += strcmp(reason, "cancelled") == 0;
    }
    say(name, stopped + cancelled);
    return cancelled;
}

// Every kind of error there is a way to ask for.
static void mistakes(long long handle, const char *folder) {
    char path[4096];
    refuse(call("load", NULL));
    refuse(call("load", "path", integer(5), NULL));
    refuse(call("load", "path", text("demo"), "contxt", integer(5), NULL));
    refuse(call("load", "path", text("demo"), "context", text("much"), NULL));
    refuse(call("plan", "path", text("/no/such/folder"), NULL));
    refuse(call("plan", "path", text("demo"), "memory_gb", number(1e-3), NULL));
    refuse(call("start", "handle", integer(999999), "messages", text("x"), NULL));
    refuse(call("start", "handle", integer(handle), "messages", must(PyBytes_FromString("x"), "bytes"), NULL));
    refuse(call("start", "handle", must(PyBool_FromLong(1), "bool"), "messages", text("x"), NULL));
    refuse(call("start", "handle", integer(handle), "messages", text("x"), "temperature", number(-1), NULL));
    refuse(call("start", "handle", integer(handle), "messages", text("x"), "top_p", number(0.0 / 0.0), NULL));
    refuse(call("ask", "handle", integer(handle), "messages", text(""), NULL));
    refuse(call("next_event", "stream", integer(-1), NULL));
    refuse(call("next_event", "stream", integer(handle), NULL));
    refuse(call("next_event", "stream", integer(handle), "timeout_seconds", number(1e9), NULL));
    refuse(call("cancel", "stream", integer(-1), NULL));
    refuse(call("stats", "handle", integer(-1), NULL));
    refuse(call("close", "handle", integer(-1), NULL));
    refuse(call("resume", "handle", integer(handle), "path", text("/no/such/file"), NULL));
    refuse(call("save", "handle", integer(handle), "path", text("/no/such/folder/file"), NULL));
    snprintf(path, sizeof path, "%s/report", folder);
    refuse(call("resume", "handle", integer(handle), "path", text(path), NULL));
    Object *missing = call("load", "path", text("/no/such/folder"), NULL);
    if (strcmp(text_in(pull(integer_in(missing, "stream"), -1), "code"), "checkpoint") != 0) die("missing");
    if (!is_ok(call("close", "handle", integer(integer_in(missing, "handle")), NULL))) die("close");
    long long wrong = integer_in(call("start", "handle", integer(handle), "messages", must(PyList_New(0), "list"), NULL),
                                 "stream");
    if (strcmp(text_in(pull(wrong, -1), "code"), "option") != 0) die("no messages");
    say("refused", refused);
}

// Another thread that takes the GIL for each call, and drops a reference of the first thread's.
static void *elsewhere(void *data) {
    long long *given = data;
    int state = PyGILState_Ensure();
    Object *result = must(PyObject_GetAttrString(bridge, "version"), "version");
    Object *version = must(PyObject_CallObject(result, NULL), "version()");
    Py_DecRef(result);
    Py_DecRef(version);
    Object *pulling = must(PyObject_GetAttrString(bridge, "next_event"), "next_event");
    PyGILState_Release(state);
    for (int is_last = 0; !is_last;) {
        state = PyGILState_Ensure();
        Object *arguments = must(PyDict_New(), "arguments"), *none = must(PyTuple_New(0), "none");
        Object *stream = integer(given[0]), *key = text("event"), *kind_key = text("kind");
        PyDict_SetItemString(arguments, "stream", stream);
        Object *pulled = must(PyObject_Call(pulling, none, arguments), "next_event");
        Object *event = must(PyObject_GetItem(pulled, key), "event");
        if (PyObject_IsTrue(event)) {
            Object *kind = must(PyObject_GetItem(event, kind_key), "kind");
            is_last = strcmp(PyUnicode_AsUTF8(kind), "done") == 0;
            Py_DecRef(kind);
        }
        Object *all[] = {arguments, none, stream, key, kind_key, pulled, event};
        for (int i = 0; i < 7; i++) Py_DecRef(all[i]);
        PyGILState_Release(state);
    }
    state = PyGILState_Ensure();
    Py_DecRef(pulling);
    PyGILState_Release(state);
    given[1] = 1;
    return NULL;
}

static void several_threads(long long handle) {
    pthread_t threads[3];
    long long given[3][2];
    for (int i = 0; i < 3; i++) {
        given[i][0] = begin(handle, i, 0);
        given[i][1] = 0;
    }
    void *state = PyEval_SaveThread();
    for (int i = 0; i < 3; i++) pthread_create(&threads[i], NULL, elsewhere, given[i]);
    for (int i = 0; i < 3; i++) pthread_join(threads[i], NULL);
    PyEval_RestoreThread(state);
    say("threads", (double)(given[0][1] + given[1][1] + given[2][1]));
}

static void prepare(const char *library, const char *paths) {
    void *python = dlopen(library, RTLD_NOW | RTLD_GLOBAL);
    if (python == NULL) die(dlerror());
#define FIND(result, name, parameters) \
    *(void **)&name = dlsym(python, #name); \
    if (name == NULL) die(#name);
    API(FIND)
    Py_Initialize();
    char code[16384];
    snprintf(code, sizeof code,
             "import sys\n"
             "import site\n"
             "for path in '%s'.split(':'):\n"
             "    site.addsitedir(path)\n"
             "sys.argv = ['']\n"
             "sys.executable = '/Applications/Host.app/Contents/MacOS/Host'\n"
             "assert sys.stdout is None, sys.stdout\n"
             "import os\n"
             "if os.environ.get('MAGISTRAL_TEST_DEVICE') == 'cpu':\n"
             "    import mlx.core as mx\n"
             "    mx.set_default_device(mx.cpu)\n",
             paths);
    if (PyRun_SimpleString(code) != 0) die("sys");
    double begun = now();
    bridge = must(PyImport_ImportModule("magistral_mlx.bridge"), "import");
    say("import_seconds", now() - begun);
}

int main(int argc, char **argv) {
    if (argc != 6) return 64;
    const char *folder = argv[3], *ending = argv[5];
    char path[4096];
    snprintf(path, sizeof path, "%s/report", folder);
    FILE *file = fopen(path, "w");
    if (file == NULL) return 65;
    report = fdopen(fcntl(fileno(file), F_DUPFD, 100), "w");
    fclose(file);
    close(0);
    close(1);
    prepare(argv[1], argv[2]);

    if (!is_ok(call("version", NULL))) die("version");
    long long handle = load("demo");
    if (!is_ok(call("plan", "path", text("demo"), NULL))) die("plan");
    mistakes(handle, folder);
    say("cancelled", streams(handle, atoi(argv[4]), "ended"));
    several_threads(handle);
    if (!is_ok(call("ask", "handle", integer(handle), "messages", question(0), "temperature", number(0), NULL))) die("ask");
    snprintf(path, sizeof path, "%s/talk", folder);
    if (!is_ok(call("save", "handle", integer(handle), "path", text(path), NULL))) die("save");
    if (entries(call("stats", "handle", integer(handle), NULL)) < 5) die("stats");
    Object *closed = call("close", "handle", integer(handle), NULL);
    if (!is_ok(closed)) die("close");
    say("bytes_after_close", (double)integer_in(closed, "active_bytes"));
    refuse(call("stats", "handle", integer(handle), NULL));
    drop_kept();  // long after what they came from is gone

    handle = load("demo");
    Object *resumed = call("resume", "handle", integer(handle), "path", text(path), NULL);
    if (!is_ok(resumed)) die("resume");
    say("resumed_tokens", (double)integer_in(resumed, "cached_tokens"));
    streams(handle, 3, "ended_again");
    for (int i = 0; i < 16 && times[i].name; i++) {
        snprintf(path, sizeof path, "longest_%s", times[i].name);
        say(path, times[i].longest);
    }
    if (strcmp(ending, "closed") == 0) {
        if (!is_ok(call("close", "handle", integer(handle), NULL))) die("close");
        drop_kept();
    } else if (strcmp(ending, "finalize") == 0) {
        begin(handle, 1, 9);
        call("next_event", "stream", integer(begin(handle, 2, 9)), NULL);  // the owner is in the middle of work
    }
    if (strcmp(ending, "finalize") == 0) say("finalized", Py_FinalizeEx());
    say("ended_by_itself", 1);
    exit(0);
}
