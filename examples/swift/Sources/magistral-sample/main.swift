// magistral-sample LIBPYTHON HOME SITE-PACKAGES MODEL QUESTION: the trace on stderr, the answer on stdout.
import Foundation
import MagistralBridge

let words = CommandLine.arguments
guard words.count == 6 else {
    FileHandle.standardError.write(Data("magistral-sample LIBPYTHON HOME SITE-PACKAGES MODEL QUESTION\n".utf8))
    exit(64)
}

@Sendable func write(_ text: String, to file: FileHandle) {
    file.write(Data(text.utf8))
}

do {
    let bridge = MagistralBridge.shared
    try await bridge.open(PythonLocation(library: words[1], home: words[2], sitePackages: words[3]))
    let model = try await bridge.load(path: words[4]) { progress in
        write("loading: \(progress.done) of \(progress.total) bytes\n", to: .standardError)
    }
    let question = MagistralBridge.Message(role: "user", content: words[5])
    for try await event in bridge.stream(model, [question]) {
        switch event {
        case .reasoning(let piece): write(piece.text, to: .standardError)
        case .answer(let piece): write(piece.text, to: .standardOutput)
        case .done(let done): write("\n\(done.usage.completionTokens) tokens, ended by \(done.finishReason)\n", to: .standardError)
        case .progress, .ready, .toolCall, .error: break
        }
    }
    write("\n", to: .standardOutput)
    try await bridge.close(model)
} catch let failed as Failed {
    write("error: \(failed.message)\n\(failed.whatToDo)\n", to: .standardError)
    exit(2)
} catch {
    write("error: \(error)\n", to: .standardError)
    exit(1)
}
