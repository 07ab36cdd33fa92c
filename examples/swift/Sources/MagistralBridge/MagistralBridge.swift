import Foundation

/// Magistral in an app: `MagistralBridge.shared`, an actor that runs Python on a thread of its own.
///
/// No call blocks the caller's thread, and no Python exception reaches Swift. Only this actor has the
/// interpreter, so Python is never called without its lock. A cancelled task cancels its stream.
public actor MagistralBridge {
    public static let shared = MagistralBridge()

    public nonisolated var unownedExecutor: UnownedSerialExecutor {
        PythonThread.shared.asUnownedSerialExecutor()
    }

    /// A loaded model; close it to free its memory.
    public struct Model: Sendable, Hashable {
        let handle: Int
    }

    /// How a model is loaded; nil is the package's default.
    public struct Options: Encodable, Sendable {
        public var maxKVSize: Int?
        public var kvBits: Int?
        public var prefillStepSize: Int?
        public var memoryGB: Double?
        public var draftModel: String?

        public init() {}

        enum CodingKeys: String, CodingKey {
            case maxKVSize = "max_kv_size"
            case kvBits = "kv_bits"
            case prefillStepSize = "prefill_step_size"
            case memoryGB = "memory_gb"
            case draftModel = "draft_model"
        }
    }

    /// How a reply is asked for; nil is the model card's value.
    public struct Sampling: Encodable, Sendable {
        public var temperature: Double?
        public var topP: Double?
        public var maxTokens: Int?
        public var seed: Int?
        public var stop: [String]?
        public var thinkBudget: Int?
        /// The last line of a trace that ends at its budget.
        public var thinkBudgetMessage: String?

        public init() {}

        enum CodingKeys: String, CodingKey {
            case temperature
            case topP = "top_p"
            case maxTokens = "max_tokens"
            case seed
            case stop
            case thinkBudget = "think_budget"
            case thinkBudgetMessage = "think_budget_message"
        }
    }

    /// One message of a conversation.
    public struct Message: Codable, Sendable, Equatable {
        public var role: String
        public var content: String

        public init(role: String, content: String) {
            self.role = role
            self.content = content
        }
    }

    /// The bytes that a model needs here, and the context that fits.
    public struct Plan: Decodable, Sendable {
        public let weightsBytes: Int
        public let totalBytes: Int
        public let budgetBytes: Int
        public let context: Int

        enum CodingKeys: String, CodingKey {
            case weightsBytes = "weights_bytes"
            case totalBytes = "total_bytes"
            case budgetBytes = "budget_bytes"
            case context
        }
    }

    /// The longest time that one pull holds this actor.
    private static let pullSeconds = 0.05
    private var interpreter: Interpreter?

    private init() {}

    /// Initialize Python, once in a process and before anything else. Takes as long as the first import.
    public func open(_ location: PythonLocation) throws {
        if interpreter == nil { interpreter = try Interpreter(location) }
    }

    /// Plan for a model without loading it.
    public func plan(path: String, options: Options = Options()) throws -> Plan {
        return try call("plan", Loading(path: path, options: options))
    }

    /// Load a folder, or "demo". Cancelling the task cancels the load.
    public func load(
        path: String, options: Options = Options(), progress: @Sendable (Progress) -> Void = { _ in }
    ) async throws -> Model {
        struct Begun: Decodable {
            let handle: Int
            let stream: Int
        }
        let begun: Begun = try call("load", Loading(path: path, options: options))
        let model = Model(handle: begun.handle)
        do {
            try await pull(begun.stream) { event in
                if case .progress(let event) = event { progress(event) }
            }
            return model
        } catch {
            try? close(model)
            throw Task.isCancelled ? CancellationError() : error
        }
    }

    /// Return the events of a reply, to `done`. Throws `Failed`. Leaving the loop cancels the reply.
    public nonisolated func stream(
        _ model: Model, _ messages: [Message], sampling: Sampling = Sampling()
    ) -> AsyncThrowingStream<MagistralEvent, Error> {
        AsyncThrowingStream { continuation in
            let task = Task {
                do {
                    try await self.reply(model, messages, sampling) { continuation.yield($0) }
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
            continuation.onTermination = { _ in task.cancel() }
        }
    }

    /// Write the conversation of the last reply and its cache to a file.
    public func save(_ model: Model, to path: String) throws {
        let _: Nothing = try call("save", Handle(handle: model.handle, path: path))
    }

    /// Read what `save` wrote, and return the messages to continue.
    public func resume(_ model: Model, from path: String) throws -> [Message] {
        struct Resumed: Decodable {
            let messages: [Message]
        }
        let resumed: Resumed = try call("resume", Handle(handle: model.handle, path: path))
        return resumed.messages
    }

    /// Cancel the model's replies and free its memory. Do this before the app ends: a process that exits
    /// while MLX computes is aborted.
    public func close(_ model: Model) throws {
        let _: Nothing = try call("close", Handle(handle: model.handle, path: nil))
    }

    private func reply(
        _ model: Model, _ messages: [Message], _ sampling: Sampling, _ take: (MagistralEvent) -> Void
    ) async throws {
        struct Arguments: Encodable {
            let handle: Int
            let messages: [Message]
            let sampling: Sampling

            enum CodingKeys: String, CodingKey {
                case handle
                case messages
            }

            func encode(to encoder: Encoder) throws {
                try sampling.encode(to: encoder)
                var container = encoder.container(keyedBy: CodingKeys.self)
                try container.encode(handle, forKey: .handle)
                try container.encode(messages, forKey: .messages)
            }
        }
        let begun: Stream = try call("start", Arguments(handle: model.handle, messages: messages, sampling: sampling))
        try await pull(begun.stream, take)
    }

    /// Pull a stream to its last event; other calls of this actor run between two pulls.
    private func pull(_ stream: Int, _ take: (MagistralEvent) -> Void) async throws {
        struct Pull: Encodable {
            let stream: Int
            let timeoutSeconds: Double

            enum CodingKeys: String, CodingKey {
                case stream
                case timeoutSeconds = "timeout_seconds"
            }
        }
        struct Pulled: Decodable {
            let event: MagistralEvent?
        }
        var isCancelled = false
        while true {
            if Task.isCancelled && !isCancelled {
                isCancelled = true  // the last event still comes
                let _: Nothing = try call("cancel", Stream(stream: stream))
            }
            let pulled: Pulled = try call("next_event", Pull(stream: stream, timeoutSeconds: Self.pullSeconds))
            if let event = pulled.event {
                if case .error(let failed) = event { throw failed }
                take(event)
                if event.isLast { return }
            }
            await Task.yield()
        }
    }

    /// Call a function of the bridge with keyword arguments; return its dictionary or throw its error.
    private func call<Result: Decodable>(_ function: String, _ arguments: some Encodable) throws -> Result {
        guard let interpreter else { throw PythonError(description: "call MagistralBridge.shared.open first") }
        let data = try interpreter.call(function, JSONEncoder().encode(arguments))
        let outcome = try JSONDecoder().decode(Outcome<Result>.self, from: data)
        switch outcome {
        case .value(let value): return value
        case .failed(let failed): throw failed
        }
    }

    private enum Outcome<Value: Decodable>: Decodable {
        case value(Value)
        case failed(Failed)

        enum CodingKeys: String, CodingKey {
            case ok
            case error
        }

        init(from decoder: Decoder) throws {
            let container = try decoder.container(keyedBy: CodingKeys.self)
            if try container.decode(Bool.self, forKey: .ok) {
                self = .value(try Value(from: decoder))
            } else {
                self = .failed(try container.decode(Failed.self, forKey: .error))
            }
        }
    }

    private struct Loading: Encodable {
        let path: String
        let options: Options

        enum CodingKeys: String, CodingKey {
            case path
        }

        func encode(to encoder: Encoder) throws {
            try options.encode(to: encoder)
            var container = encoder.container(keyedBy: CodingKeys.self)
            try container.encode(path, forKey: .path)
        }
    }

    private struct Handle: Encodable {
        let handle: Int
        let path: String?
    }

    private struct Stream: Codable {
        let stream: Int
    }

    private struct Nothing: Decodable {}
}
