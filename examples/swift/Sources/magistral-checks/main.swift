// magistral-checks LIBPYTHON HOME SITE-PACKAGES: checks of what an app does with a model.
import Foundation
import MagistralBridge

let words = CommandLine.arguments
let bridge = MagistralBridge.shared
let question = MagistralBridge.Message(role: "user", content: "What is 48 + 76?")
var greedy = MagistralBridge.Sampling()
greedy.temperature = 0
var endless = MagistralBridge.Sampling()  // random ids continue to the end of the context
endless.temperature = 9
endless.topP = 1
let (calm, wild) = (greedy, endless)

@Sendable func expect(_ isTrue: Bool, _ what: String) {
    print(isTrue ? "ok" : "FAILED", what)
    if !isTrue { exit(1) }
}

/// Return the code of the error that is thrown.
@Sendable func code(_ work: () async throws -> Void) async -> String {
    do {
        try await work()
        return "nothing"
    } catch let failed as Failed {
        return failed.code
    } catch {
        return "\(type(of: error))"
    }
}

@Sendable func answer(_ model: MagistralBridge.Model) async throws -> String {
    var text = ""
    for try await event in bridge.stream(model, [question], sampling: calm) {
        if case .answer(let piece) = event { text += piece.text }
    }
    return text
}

guard words.count == 4 else {
    FileHandle.standardError.write(Data("magistral-checks LIBPYTHON HOME SITE-PACKAGES\n".utf8))
    exit(64)
}
expect(await code { _ = try await bridge.plan(path: "demo") } == "PythonError", "nothing works before open")
try await bridge.open(PythonLocation(library: words[1], home: words[2], sitePackages: words[3]))
expect(await code { _ = try await bridge.load(path: "/no/such/folder") } == "checkpoint", "a folder that is missing")

let loading = Task { try await bridge.load(path: "demo") }
loading.cancel()
expect(await code { _ = try await loading.value } == "CancellationError", "a load that is cancelled")

let model = try await bridge.load(path: "demo")
for pieces in 1...10 {
    var seen = 0
    for try await event in bridge.stream(model, [question], sampling: wild) {
        if case .answer = event { seen += 1 }
        if seen == pieces { break }
    }
}
expect(try await answer(model).contains("124"), "a reply after ten that were left")

let answers = try await withThrowingTaskGroup(of: String.self) { group in
    for _ in 0..<5 { group.addTask { try await answer(model) } }
    var found: Set<String> = []
    for try await text in group { found.insert(text) }
    return found
}
expect(answers.count == 1, "five tasks at once")

let busy = Task { for try await _ in bridge.stream(model, [question], sampling: wild) {} }
expect(try await bridge.plan(path: "demo").context > 0, "another call amid a reply")
busy.cancel()
_ = await busy.result
var wrong = MagistralBridge.Sampling()
wrong.temperature = -1
let mistaken = wrong
expect(
    await code { for try await _ in bridge.stream(model, [question], sampling: mistaken) {} } == "option",
    "a temperature under 0"
)

_ = try await answer(model)
let file = FileManager.default.temporaryDirectory.appendingPathComponent("talk-\(UUID().uuidString)").path
try await bridge.save(model, to: file)
expect(try await bridge.resume(model, from: file).first == question, "a conversation is saved and resumed")
try FileManager.default.removeItem(atPath: file)

let left = Task { for try await _ in bridge.stream(model, [question], sampling: wild) {} }
try await Task.sleep(nanoseconds: 50_000_000)
try await bridge.close(model)
expect(await code { try await left.value } == "closed", "a stream of a model that was closed")
expect(await code { try await bridge.close(model) } == "closed", "a model that is closed")

let again = try await bridge.load(path: "demo")
expect(try await answer(again).contains("124"), "unloaded and loaded again")
try await bridge.close(again)
print("all ok")
